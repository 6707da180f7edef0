"""What a newcomer types wrong gets an answer that names what is missing, and nothing else."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("score real made -o s.html", "expected CTs at real, found nothing: check the path"),
        ("report scans -o r.html", "expected CTs at scans, found nothing: check the path"),
        ("encode scans -o out --workers 2", "found scans: check the path, or leave --workers out"),
        ("encode scans.csv -o out", "a list at scans.csv, found No such file or directory: check"),
        ("augment --nnunet Dataset001_A -o Dataset002_A", "found No such file or directory: pass"),
        ("decode ct.nii.gz -o r.nii.gz", "found a file: create one with fvae encode"),
    ],
)
def test_a_wrong_path_is_named(fvae, ct, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = fvae(*arguments.split())
    assert (code in (2, 3), out, err.count("\n")) == (True, "", 1)
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii.gz"]


def test_a_list_may_have_spaces_around_its_commas(fvae, ct, fake, tmp_path):
    (tmp_path / "scans.csv").write_text(" ct , output\n ct.nii.gz, out.zarr \n")
    code, _, err = fvae("encode", tmp_path / "scans.csv", "-o", tmp_path / "latents", *fake)
    assert code == 0, err
    assert (tmp_path / "latents" / "out.zarr").is_dir()


def test_a_phantom_says_what_was_written_and_what_its_report_is(fvae, tmp_path):
    path = tmp_path / "p.nii.gz"
    assert fvae("phantom", "-o", path, "--shape", "24,20,9")[1] == f"{path}: 9 slices of 24x20\n"
    drawn = fvae("phantom", "-o", path, "--patient", 3, "--shape", "24,20,9", "--overwrite")[1]
    assert drawn.startswith(f"{path}: 9 slices of 24x20. Report: ")


def test_the_table_of_a_batch_has_the_memory_of_the_process(fvae, ct, fake, tmp_path):
    (tmp_path / "scans").mkdir()
    ct.rename(tmp_path / "scans" / "ct.nii.gz")
    code, out, _ = fvae("encode", tmp_path / "scans", "-o", tmp_path / "latents", *fake)
    (row,) = [line for line in out.splitlines() if "ct.nii.gz" in line]
    assert code == 0
    assert float(row.split("│")[5]) > 40  # an interpreter with numpy alone takes as much
