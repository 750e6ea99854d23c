"""Documents that are kept apart do not see each other, whichever attention is used."""

from pathlib import Path

import pytest
import torch

from llmtrain.errors import TrainingError
from llmtrain.mode.base import Learner
from llmtrain.model.stored import make_savable
from llmtrain.probe import check_apart
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


def learner(architecture: str, **sizes: int) -> Learner:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=64, **sizes)
    return Learner(AutoModelForCausalLM.from_config(config))


def test_a_model_that_does_not_look_at_positions_is_refused_before_training() -> None:
    with pytest.raises(TrainingError, match="bloom model see each other: set data.packing=false"):
        check_apart(learner("bloom", hidden_size=32, n_layer=2, n_head=2))


def test_models_that_keep_documents_apart_pass_the_probe() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    check_apart(learner("qwen2", **sizes, **heads))
    check_apart(learner("mamba", **sizes))


def test_settings_of_generation_that_transformers_would_not_save_are_made_savable(
    tmp_path: Path,
) -> None:
    from transformers import GenerationConfig

    settings = GenerationConfig(temperature=0.6, top_p=0.9)
    with pytest.raises(ValueError):
        settings.save_pretrained(tmp_path)
    make_savable(settings)
    settings.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.6
