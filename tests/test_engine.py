"""What the engine checks before it trains."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmtrain.engine import load_mamba_ssm
from llmtrain.errors import TrainingError


def test_a_mamba_ssm_of_another_torch_ends_the_run_rather_than_slow_it_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = "undefined symbol: _ZN3c104cuda9SetDeviceEi"
    (tmp_path / "selective_scan_cuda.py").write_text(f"raise ImportError({error!r})")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match=f"{error}. Build it again"):
        load_mamba_ssm()
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    load_mamba_ssm()
