"""The manifest of a checkpoint: every file that was altered, removed, added or replaced is found and named."""

import json
import os

import pytest

from tests.builders.damage import DAMAGES, flip_bit
from tests.builders.fuzz import check_door
from tsp_jax.training.checkpoint_manifest import MANIFEST, find_damage, write_manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "state").mkdir(parents=True)
    for name in ("state/one", "state/two", "meta.json"):
        (folder / name).write_text(name * 100)
    write_manifest(folder)
    return folder


def test_what_was_written_has_no_damage(folder):
    assert find_damage(folder) is None


@pytest.mark.parametrize("name", ["state/one", "state/two", "meta.json", MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_file_named(damage, name, folder):
    DAMAGES[damage](folder / name)
    if name == MANIFEST and damage == "a bit flipped":
        assert find_damage(folder)  # by the digest or the name that it hit
    else:
        assert find_damage(folder).startswith(name)


def test_every_part_of_the_files_is_somebodys(folder):
    flip_bit(folder / "state" / "two")
    assert sum(find_damage(folder, part, 3) is not None for part in range(3)) == 1


MANIFESTS = ["", "null", "[]", "{}", '{"sha256": {}}', '{"sha256": {"a": 3}}', '{"sha256": {"a": ""}}', "\xff\xfe"]


@pytest.mark.parametrize("content", [*MANIFESTS, "[" * 100_000])
def test_a_manifest_of_anything_else_is_damage(content, folder):
    (folder / MANIFEST).write_text(content, encoding="latin-1")
    assert find_damage(folder).startswith(f"{MANIFEST} (")


ADDED = {
    "a file": ("state/three", lambda folder: (folder / "state" / "three").write_text("altered")),
    "in a hidden folder": (".state/x", lambda folder: ((folder / ".state").mkdir(), (folder / ".state/x").touch())),
    "a FIFO": ("fifo", lambda folder: os.mkfifo(folder / "fifo")),
    "a link to nothing": ("link", lambda folder: (folder / "link").symlink_to("nowhere")),
    "a link to a device": ("state/zero", lambda folder: (folder / "state" / "zero").symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("case", ADDED)
def test_a_file_that_the_manifest_does_not_list_is_damage(case, folder):
    name, add = ADDED[case]
    add(folder)
    assert find_damage(folder) == f"{name} (is not listed in manifest.json)"


def test_an_altered_file_is_found_though_its_line_is_cut_from_the_manifest(folder):
    flip_bit(folder / "state" / "two")
    listing = json.loads((folder / MANIFEST).read_text())
    del listing["sha256"]["state/two"]
    (folder / MANIFEST).write_text(json.dumps(listing))
    assert find_damage(folder) == "state/two (is not listed in manifest.json)"


@pytest.mark.parametrize("name", ["state/one", MANIFEST])
@pytest.mark.parametrize("replace", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"])
def test_what_is_no_regular_file_is_damage_and_not_waited_for(name, replace, folder):
    (folder / name).unlink()
    replace(folder / name)
    assert find_damage(folder).startswith(f"{name} (")
    assert "is not a regular file" in find_damage(folder)


def test_a_folder_that_was_moved_to_another_disk_and_linked_is_no_damage(folder, tmp_path):
    (folder / "state").rename(tmp_path / "elsewhere")
    (folder / "state").symlink_to(tmp_path / "elsewhere")
    assert find_damage(folder) is None


def test_paths_out_of_the_folder_are_not_opened(folder):
    (folder / MANIFEST).write_text(json.dumps({"sha256": {"../../etc/passwd": "0" * 64}}))
    assert find_damage(folder) == "../../etc/passwd (is missing)"


@pytest.mark.soak
def test_fuzz_of_a_manifest(folder):
    """Damage is named in a line, or what the manifest says is unchanged."""
    path = folder / MANIFEST
    whole = path.read_bytes()

    def read(content: bytes):
        path.write_bytes(content)
        damage = find_damage(folder)
        assert damage is None or "\n" not in damage
        assert damage or json.loads(content)["sha256"] == json.loads(whole)["sha256"]

    check_door(read, [whole], ())
