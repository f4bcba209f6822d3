"""The precision that a run computes in by default."""

import pytest
import torch
from tests_common import NET, finetune

from util.dist import computes_bf16
from util.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("value,name", [("1", "bf16"), ("0", "off")])
def test_the_environment_forces_either_default_on_any_machine(value, name, monkeypatch, capsys):
    monkeypatch.setenv("NOISEVIT_BF16", value)
    assert computes_bf16(CPU) == (name == "bf16")
    assert finetune(*NET, "--epochs", 1, "--output_dir", "") == 0
    assert f"amp {name}" in capsys.readouterr().out.splitlines()[0]


def test_a_wrong_value_in_the_environment_is_one_line(monkeypatch):
    monkeypatch.setenv("NOISEVIT_BF16", "yes")
    with pytest.raises(UserError, match=r"^NOISEVIT_BF16=yes: should be 1 .*, 0 .* or unset$"):
        computes_bf16(CPU)


def test_without_the_environment_the_machine_decides(monkeypatch):
    monkeypatch.delenv("NOISEVIT_BF16", raising=False)
    for avx512, amx in [(False, False), (True, False), (False, True)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda yes=avx512: yes)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda yes=amx: yes)
        assert computes_bf16(CPU) == (avx512 or amx)
