"""Documents that are kept apart do not see each other, whichever attention is used."""

import pytest
import torch

from tests.conftest import SMALL
from tests.test_compose import compose_config

HALF = 16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", [1, 2])
def test_changing_one_document_moves_no_logit_of_another(attention: str, batch: int) -> None:
    torch.manual_seed(0)
    config = compose_config(*SMALL)
    model = config.model.build(torch.float32, attention).train()
    tokens_BL = torch.randint(512, (batch, 2 * HALF))
    changed_BL = tokens_BL.clone()
    changed_BL[:, :HALF] = torch.randint(512, (batch, HALF))
    positions_BL = torch.arange(HALF).repeat(2).expand(batch, -1)
    options = {"position_ids": positions_BL, "use_cache": False}
    with torch.no_grad():
        apart = [model(ids, **options).logits[:, HALF:] for ids in (tokens_BL, changed_BL)]
        joined = [model(ids, use_cache=False).logits[:, HALF:] for ids in (tokens_BL, changed_BL)]
    torch.testing.assert_close(apart[0], apart[1])
    assert not torch.allclose(joined[0], joined[1])
