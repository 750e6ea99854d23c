"""What a start imports, and what it leaves alone."""

import gc
import os
import subprocess
import sys

import pytest

from llmtrain.imports import uncollected


def test_deepspeed_is_imported_without_mlflow_which_can_be_imported_afterwards():
    pytest.importorskip("mlflow", reason="needs mlflow: pip install -e '.[mlflow]'")
    code = (
        "import sys; from llmtrain.imports import import_deepspeed; import_deepspeed('cpu');"
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules;"
        "import mlflow; assert mlflow.log_metric"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_garbage_is_collected_again_after_imports_that_failed():
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_a_hidden_package_is_not_installed_meanwhile(tmp_path):
    """As pynvml for DeepSpeed, which with it reads UUIDs of GPUs as numbers."""
    (tmp_path / "pynvml.py").write_text("")
    hidden = (
        "import sys; import pynvml; from llmtrain.imports import hidden\n"
        "with hidden('pynvml', 'mlflow'):\n"
        "    try: import pynvml\n"
        "    except ImportError: print('none here')\n"
        "assert sys.modules['pynvml'] is pynvml and 'mlflow' not in sys.modules"
    )
    told = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, env=told, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "none here\n"
