"""Files of `torch.save` are read without running anything in them."""

import io
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from diffusion_grpo.errors import UsageError
from diffusion_grpo.torch_file import read_torch_file, tensors_of
from diffusion_grpo.weights import is_weights_file, read_weights, weights_file


def same(found, expected) -> None:
    """Compare what was read with what torch saved, arrays with tensors."""
    if isinstance(expected, torch.Tensor):
        numbers = expected.detach()
        if numbers.dtype == torch.bfloat16:
            assert found.dtype == ml_dtypes.bfloat16
            found, numbers = found.astype(np.float32), numbers.float()
        np.testing.assert_array_equal(found, numbers.numpy(), strict=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    else:
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("protocol", [2, 4])
def test_whatever_torch_saves_of_tensors_and_plain_data_is_read(tmp_path, protocol) -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    saved = {
        "model": torch.nn.Linear(3, 4).state_dict(),
        "views": [base, base[1:4, ::2], base.T, base[2]],
        "dtypes": [base.to(d) for d in (torch.float64, torch.float16, torch.bfloat16)],
        "whole": tuple(torch.arange(5).to(d) for d in (torch.int64, torch.int32, torch.uint8)),
        "others": [torch.tensor([True, False]), torch.tensor(3.0), torch.zeros(0, 4)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": {
            "epoch": 3,
            "rate": 1e-4,
            "name": "Ärger",
            "none": None,
            "on": True,
            7: (1, (2,)),
        },
        "large": 2**40,
        "ordered": OrderedDict(a=1),
    }
    path = tmp_path / "saved.pth"
    torch.save(saved, path, pickle_protocol=protocol)
    same(read_torch_file(path), saved)


def write(path, code: bytes, storages=(), compress=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", code)
        for key, data in dict(storages).items():
            archive.writestr(f"archive/data/{key}", data)


class Evil:
    """What unpickling would run."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("call", [(open, "made", "w"), (eval, "open('made', 'w')"), (exec, "1/0")])
def test_nothing_in_a_file_is_run(tmp_path, monkeypatch, protocol, call) -> None:
    monkeypatch.chdir(tmp_path)
    for evil in (Evil(*call), {"weight": Evil(*call)}, [OrderedDict(a=Evil(*call))]):
        write("evil.pth", pickle.dumps(evil, protocol))
        with pytest.raises(UsageError, match="neither a tensor nor plain data|cannot be read"):
            read_torch_file("evil.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]
    # The same file does run when it is unpickled, or this test would show nothing.
    if call[0] is open:
        pickle.loads(pickle.dumps(Evil(*call), protocol)).close()
        assert (tmp_path / "made").exists()


def test_what_is_refused_is_named(tmp_path) -> None:
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UsageError, match=r"holds a torch\.nn\.modules\.linear\.Linear|NEWOBJ"):
        read_torch_file(path)
    torch.save({"a": np.float64(1.5)}, path)
    with pytest.raises(UsageError, match=r"model\.pth holds a numpy\..*save the state_dict"):
        read_torch_file(path)


def tensor_code(count: int, offset: int, shape: tuple, strides: tuple, key: str = "0") -> bytes:
    """The pickle of one float tensor, as torch writes it, with numbers of our own."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", count) if value == "here" else None

    class Rebuilt:
        def __reduce__(self):
            arguments = ("here", offset, shape, strides, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"weight": Rebuilt()})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("code", "data", "message"),
    [
        (tensor_code(4, 0, (4,), (1,)), b"1234", "storage 0 has 4 bytes, not 16"),
        (tensor_code(4, 1, (4,), (1,)), b"1234" * 4, "reaches past the 4 elements"),
        (tensor_code(4, 0, (2, 2), (3, 1)), b"1234" * 4, "reaches past the 4 elements"),
        (tensor_code(4, 0, (1 << 40,), (0,)), b"1234" * 4, "in a storage of 4 elements"),
        (tensor_code(4, -1, (2,), (1,)), b"1234" * 4, "offset -1"),
        (tensor_code(4, 0, (2,), (-1,)), b"1234" * 4, r"strides \(-1,\)"),
        (tensor_code(4, 0, (4,), (1,), "9"), b"1234" * 4, "data/9 is missing"),
        (b"\x80\x02}q\x00", b"", "malformed|ends too early"),
        (b"\x80\x02.", b"", "malformed"),
        (b"garbage", b"", "malformed|opcode"),
    ],
)
def test_damaged_and_lying_files_are_refused(tmp_path, code, data, message) -> None:
    write(tmp_path / "bad.pth", code, {"0": data})
    with pytest.raises(UsageError, match=message):
        read_torch_file(tmp_path / "bad.pth")


def test_a_sound_tensor_of_our_own_writing_is_read(tmp_path) -> None:
    data = np.arange(6, dtype=np.float32)
    write(tmp_path / "good.pth", tensor_code(6, 1, (2, 2), (2, 1)), {"0": data.tobytes()})
    np.testing.assert_array_equal(
        read_torch_file(tmp_path / "good.pth")["weight"], [[1, 2], [3, 4]]
    )


def test_compressed_archives_and_other_files_are_refused(tmp_path) -> None:
    path = tmp_path / "packed.pth"
    write(path, tensor_code(4, 0, (4,), (1,)), {"0": bytes(16)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UsageError, match="compressed"):
        read_torch_file(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match="not a readable zip archive.*before 1.6"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UsageError, match="without data.pkl"):
        read_torch_file(path)
    with pytest.raises(UsageError, match="no such file"):
        read_torch_file(tmp_path / "nowhere.pth")


def test_the_state_dictionary_is_found(tmp_path) -> None:
    arrays = {"w": np.zeros(2)}
    assert tensors_of(arrays, source="x") == arrays
    assert tensors_of({"epoch": 1, "state_dict": arrays}, source="x") == arrays
    for saved in ({}, [arrays], {"w": 3}, {"epoch": 1}, {1: np.zeros(2)}):
        with pytest.raises(UsageError, match="x holds no dictionary of tensors by name"):
            tensors_of(saved, source="x")


def test_weights_are_found_and_read_by_their_suffix(tmp_path) -> None:
    assert is_weights_file("a/b/C.PTH") and not is_weights_file("owner/name")
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    found = read_weights(weights_file(str(tmp_path / "w.pt")))
    np.testing.assert_array_equal(found["w"], [1, 1])
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        read_weights(tmp_path / "w.safetensors")
    for name in ("nowhere.pth", "./a/b.pth", "owner/name", "a/b/c.txt"):
        with pytest.raises(UsageError, match=f"weights '{name}': no such file; expected a file"):
            weights_file(name)
    with pytest.raises(UsageError, match="'a/b/c.pth': not a file here, and the hub did not give"):
        weights_file("a/b/c.pth")


def test_a_file_of_the_hub_is_asked_for_at_the_revision_in_its_name(tmp_path, monkeypatch) -> None:
    asked = []

    def hf_hub_download(place, file, *, revision):
        asked.append((place, file, revision))
        return str(tmp_path / "w.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    for name in ("a/b@v2/c.pth", "a/b/c.pth", "a/b/d@e/c.pth"):
        assert weights_file(name) == tmp_path / "w.pt"
    pairs = [("a/b", "c.pth", "v2"), ("a/b", "c.pth", None), ("a/b", "d@e/c.pth", None)]
    assert asked == pairs
