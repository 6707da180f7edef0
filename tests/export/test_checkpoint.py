"""Pickles are read without running code, and errors are one line."""

from __future__ import annotations

import datetime
import pickle
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the export extra")

from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.checkpoint import load_checkpoint  # noqa: E402


@given(
    st.one_of(st.binary(max_size=99), st.binary(max_size=99).map(lambda rest: b"\x80\x02" + rest))
)
@example(b"junk")
@example(pickle.dumps({"a": datetime.datetime(2020, 1, 1)}))
def test_any_bytes_load_or_give_one_line_without_unsafe_advice(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "w.ckpt")
        path.write_bytes(content)
        message = ""
        try:
            load_checkpoint(path)
        except BundleError as error:
            message = str(error)
    assert message == "" or message.endswith("; save it again as safetensors")
    assert "weights_only" not in message
    assert "trust" not in message


def test_an_error_that_is_only_a_number_is_reported_with_its_type(tmp_path):
    (tmp_path / "w.ckpt").write_bytes(b"\x80\x02h\xad.")  # asks for a memo that is not there
    with pytest.raises(BundleError, match="KeyError: 173; save"):
        load_checkpoint(tmp_path / "w.ckpt")


def test_a_class_that_would_have_to_be_run_is_named(tmp_path):
    torch.save({"state_dict": {}, "when": datetime.datetime(2020, 1, 1)}, tmp_path / "w.ckpt")
    with pytest.raises(BundleError, match=r"loading the datetime\.datetime in it would run code"):
        load_checkpoint(tmp_path / "w.ckpt")
