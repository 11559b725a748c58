"""Tensors of TorchScript archives, read without running what is in them."""

import pickle
import warnings
import zipfile

import pytest
import torch
from torch import nn

from gpipe.models.torchscript_archive import is_torchscript, read_torchscript


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.bn = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("number", torch.tensor(77))
        self.halves = nn.Sequential(nn.ReLU(), nn.Linear(3, 3).half(), nn.Linear(3, 3).bfloat16())
        part = torch.arange(12.0).reshape(3, 4)
        self.view = nn.Parameter(part[1:, ::2])
        self.transposed = nn.Parameter(part.T)
        self.register_buffer("none", torch.zeros(0, 4, dtype=torch.bool))
        self.counts = [1, 2]
        self.name = "net"

    def forward(self, x):
        return self.bn(self.linear(x)) * self.scale


def archived(path, how="trace", module=None):
    module = Net().eval() if module is None else module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        made = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.randn(2, 2))
        torch.jit.save(made, path)
    return module.state_dict()


@pytest.mark.parametrize("how", ["trace", "script"])
def test_all_tensors_are_read_to_the_bit(how, tmp_path):
    torch.manual_seed(0)
    expected = archived(tmp_path / "net.pt", how)
    assert is_torchscript(tmp_path / "net.pt")
    found = read_torchscript(tmp_path / "net.pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_other_files_are_told_apart(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"no zip")
    assert not is_torchscript(tmp_path / "a.pt")
    assert not is_torchscript(tmp_path / "b.pt")


def rewritten(path, target, change):
    """The archive with members as ``change(name, data)`` gives them; None leaves one out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if (data := change(name.partition("/")[2], old.read(name))) is not None:
                new.writestr(name, data)
    return target


class Runs:
    """Unpickled by pickle itself, it would touch a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_an_archive_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    archived(tmp_path / "net.pt")
    evidence = tmp_path / "evidence"
    bad = pickle.dumps(Runs(evidence))
    pickle.loads(bad).close()
    assert evidence.exists()  # so it is what the test takes it for
    evidence.unlink()
    path = rewritten(tmp_path / "net.pt", tmp_path / "bad.pt", lambda name, data: bad if name == "data.pkl" else data)
    with pytest.raises(ValueError, match=r"bad\.pt: it asks for _?io\.open, which could run code; .*safetensors"):
        read_torchscript(path)
    assert not evidence.exists()


@pytest.mark.parametrize("name", ["builtins eval", "torch load", "torch._utils _import_dotted_name", "os system"])
def test_names_beyond_tensors_are_refused(name, tmp_path):
    archived(tmp_path / "net.pt")
    bad = b"c" + name.replace(" ", "\n").encode() + b"\n(tR."
    path = rewritten(tmp_path / "net.pt", tmp_path / "bad.pt", lambda at, data: bad if at == "data.pkl" else data)
    with pytest.raises(ValueError, match=f"asks for {name.replace(' ', '.')}, which could run code"):
        read_torchscript(path)


def test_code_in_the_archive_is_never_looked_at(tmp_path):
    expected = archived(tmp_path / "net.pt")
    path = rewritten(
        tmp_path / "net.pt", tmp_path / "odd.pt", lambda at, data: b"!" if at.startswith("code/") else data
    )
    assert read_torchscript(path).keys() == expected.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at, data: data[:-4] if at == "data/0" else data, "data/0 has 0 bytes where 1 of torch.float32"),
        (lambda at, data: None if at == "data/0" else data, "data/0"),
        (lambda at, data: b"big" if at == "byteorder" else data, "big-endian"),
        (lambda at, data: data[:40] if at == "data.pkl" else data, "truncated|ran out"),
        (lambda at, data: pickle.dumps(3, 2) if at == "data.pkl" else data, "it holds int"),
        (lambda at, data: None if at == "data.pkl" else data, "has 0 members data.pkl"),
    ],
)
def test_damaged_archives_are_refused(change, message, tmp_path):
    archived(tmp_path / "net.pt")
    path = rewritten(tmp_path / "net.pt", tmp_path / "bad.pt", change)
    with pytest.raises(ValueError, match=f"expected a TorchScript archive of a module, given .*{message}"):
        read_torchscript(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    weights = archived(tmp_path / "net.pt")["linear.weight"].numpy().tobytes()
    data = bytearray((tmp_path / "net.pt").read_bytes())
    data[data.index(weights)] ^= 1
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        read_torchscript(tmp_path / "bad.pt")
