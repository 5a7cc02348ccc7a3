"""Collecting on a real S3 store: what is new, what is not, and a state that moves only when it should."""

import hashlib
import threading
import time
from pathlib import Path

import pytest

from softteacher import storage
from softteacher.collecting import collect as module
from softteacher.collecting.collect import commit, hash_shard, merge, plan
from softteacher.collecting.hashes import Look
from softteacher.collecting.rounds import State
from softteacher.data.coco import load_coco
from softteacher.errors import Conflict, UserError
from tests.arrivals import SIZE, Place, picture


def files(folder: str) -> dict[str, bytes]:
    return {f.name: storage.read_bytes(storage.join(folder, f.name)) for f in storage.list_files(folder)}


def test_rounds(place):
    facts = place.collect()
    assert (facts["enough"], facts["new"], facts["round"]) == (False, 0, 1)
    assert "0 new images" in facts["reason"]
    for n in (10, 11, 12):
        place.put(f"b/{n}.png", picture(n))
    facts = place.collect()
    assert (facts["enough"], facts["new"], facts["of_earlier_rounds"]) == (True, 3, 0)
    assert place.names(new=False) == ["2.png", "3.png", "4.png"]
    assert place.names(new=True) == ["b/10.png", "b/11.png", "b/12.png"]
    unlabeled = place.part("unlabeled")
    assert [unlabeled.uri(n) for n in (0, 3)] == [f"{place.root}/images/2.png", f"{place.source}/b/10.png"]
    assert all(storage.exists(unlabeled.uri(n)) for n in range(len(unlabeled)))
    assert (unlabeled.images[3].width, unlabeled.images[3].height) == SIZE
    assert unlabeled.fingerprint() == facts["unlabeled"]["fingerprint"]
    for part in ("labeled", "validation"):
        assert place.part(part).fingerprint() == load_coco(f"{place.base}/{part}.json").fingerprint()

    # killed before the commit: the same again, to the byte
    first = files(place.pending)
    assert place.collect() == facts
    assert files(place.pending) == first
    assert not storage.exists(place.state)

    told = place.commit(run="run-1")
    assert (told["round"], told["accepted"], told["images"]) == (1, True, 3)
    assert place.collect()["enough"] is False
    assert place.names(new=False) == ["2.png", "3.png", "4.png", "b/10.png", "b/11.png", "b/12.png"]

    # a late arrival, whose name comes before those that were there
    place.put("a/13.jpg", picture(13, "JPEG"))
    facts = place.collect()
    assert (facts["new"], facts["of_earlier_rounds"], facts["round"]) == (1, 3, 2)
    assert place.names(new=True) == ["a/13.jpg"]
    ids = [i.id for part in ("labeled", "unlabeled", "validation") for i in place.part(part).images]
    assert len(set(ids)) == len(ids) == 2 + 7 + 2
    place.commit(run="run-2")
    rounds = State.read(place.state).rounds
    assert [(r["round"], r["run"], r["accepted"], r["images"]) for r in rounds] == [
        (1, "run-1", True, 3),
        (2, "run-2", True, 1),
    ]


def test_only_new_images_are_read(local, monkeypatch):
    local.put("10.png", picture(10))
    local.collect()
    local.commit()
    local.put("11.png", picture(11))
    read = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(str(uri)) or real(uri))
    local.collect()
    assert [uri for uri in read if uri.endswith(".png")] == [f"{local.source}/11.png"]


def test_what_is_not_new(local):
    local.put("10.png", picture(10))
    local.collect()
    local.commit()
    for name, data in {
        "a copy.png": picture(10),
        "again.jpg": picture(10, "JPEG", quality=60),
        "smaller.jpg": picture(10, "JPEG", scale=0.75),
        "of the labelled.png": picture(1),
        "of the unlabelled.jpg": picture(3, "JPEG", quality=80),
        "validation.png": picture(5),
        "validation.jpg": picture(6, "JPEG", quality=50, scale=0.5),
        "twin-1.png": picture(20),
        "twin-2.png": picture(20),
        "twin-3.jpg": picture(20, "JPEG", quality=70),
        "notes.txt": b"hello",
        "no-suffix": picture(21),
    }.items():
        local.put(name, data)
    facts = local.collect()
    assert local.names(new=True) == ["twin-1.png"]
    assert local.names(new=False) == ["2.png", "3.png", "4.png", "10.png"]
    counts = {kind: next(iter(entry.values())) for kind, entry in facts["left_out"].items()}
    assert counts == {
        "broken": 0,
        "in the validation set": 2,
        "labelled": 0,
        "duplicates": 3,
        "near-duplicates": 4,
        "files that are no images": 2,
    }
    assert facts["left_out"]["in the validation set"]["first"] == [
        f"{local.source}/validation.jpg",
        f"{local.source}/validation.png",
    ]
    # without the perceptual hash only equal files are the same
    assert local.collect(near_duplicate_bits=-1)["new"] == 1 + 5
    assert "validation.png" not in local.names()


def test_changed_renamed_and_removed_images(local):
    for n in (10, 11, 12, 13):
        local.put(f"{n}.png", picture(n))
    local.collect()
    local.commit()
    local.put("10.png", picture(30))  # another picture under an old name
    local.put("11.png", picture(11, compress_level=1))  # the same picture in other bytes
    local.put("moved/12.png", picture(12))
    for name in ("12.png", "13.png"):
        storage.remove(f"{local.source}/{name}")
    facts = local.collect()
    assert local.names(new=True) == ["10.png"]
    assert local.names(new=False) == ["2.png", "3.png", "4.png", "11.png", "moved/12.png"]
    assert facts["of_earlier_rounds"] == 2
    local.commit()
    local.put("13.png", picture(13))  # back again, of round 1
    assert local.collect()["new"] == 0
    assert local.names() == ["2.png", "3.png", "4.png", "10.png", "11.png", "13.png", "moved/12.png"]


def test_a_rejected_round(local):
    local.put("10.png", picture(10))
    local.collect()
    local.commit(accepted=True)
    local.put("11.png", picture(11))
    local.collect()
    assert local.commit(accepted=False)["accepted"] is False
    local.put("copy of 11.png", picture(11))
    facts = local.collect()
    assert (facts["enough"], facts["round"]) == (False, 3)
    assert local.names() == ["2.png", "3.png", "4.png", "10.png"]
    facts = local.collect(include_rejected=True)
    assert (facts["enough"], facts["new"]) == (True, 1)
    assert local.names(new=True) == ["11.png"]
    local.commit(accepted=True)
    local.collect()
    assert local.names() == ["2.png", "3.png", "4.png", "10.png", "11.png"]


def test_too_few_new_images_stay_new(local):
    local.put("10.png", picture(10))
    assert local.collect(min_new=2)["enough"] is False
    assert local.commit() == {"round": None, "images": 1, "labeled": 0, "accepted": None, "index": place_index(local)}
    assert State.read(local.state).rounds == []
    local.put("11.png", picture(11))
    facts = local.collect(min_new=2)
    assert (facts["enough"], facts["new"], facts["round"]) == (True, 2, 1)
    assert local.names(new=True) == ["10.png", "11.png"]


def place_index(place: Place) -> str | None:
    return State.read(place.state).index


def test_validation_images_that_can_not_be_compared(local, capsys):
    local.put("10.png", picture(10))
    Path(local.root, "images", "5.png").unlink()
    assert local.collect()["new"] == 1
    assert "1 of 2 validation images are missing or broken" in " ".join(capsys.readouterr().err.split())
    Path(local.root, "images", "6.png").write_bytes(b"x")
    with pytest.raises(
        UserError, match="2 of 2 validation images are missing or broken; what arrives can't be compared"
    ):
        local.collect()


def test_broken_images(local, capsys):
    for n in range(10, 30):
        local.put(f"{n}.png", picture(n))
    local.put("torn.jpg", picture(40, "JPEG")[:-500])
    local.put("text.png", b"no image")
    local.put("zero.png", b"")
    with pytest.raises(UserError, match=r"3 of 23 images that arrived are broken, 2 allowed; first: /.*/text\.png"):
        local.collect()
    assert not storage.exists(local.state)
    assert not Path(local.pending).exists()
    facts = local.collect(max_bad_images=0.2)
    assert (facts["new"], facts["left_out"]["broken"]["images"]) == (20, 3)
    assert "zero.png: empty file" in " ".join(capsys.readouterr().err.split())
    local.commit()
    # known to be broken now: they count against no bound any more, and one is repaired
    local.put("torn.jpg", picture(40, "JPEG"))
    facts = local.collect(max_bad_images=0)
    assert local.names(new=True) == ["torn.jpg"]
    assert facts["left_out"]["broken"]["images"] == 2
    local.commit()
    # one is always survived, even of one
    local.put("alone.png", b"x")
    assert local.collect(max_bad_images=0)["enough"] is False


@pytest.mark.parametrize("where", ["local", "place"])
def test_odd_names(where, request):
    place = request.getfixturevalue(where)
    good = ["ü 方/a#b?c%20d+e.png", " leading.png", "UPPER.PNG", "q'uo\"te.png", "new\nline.png"]
    for n, name in enumerate(good, start=10):
        place.put(name, picture(n))
    if where == "local":  # SeaweedFS takes it for a slash
        place.put("back\\slash.png", picture(40))
    facts = place.collect(max_bad_images=1)
    assert sorted(place.names(new=True)) == sorted(good)
    if where == "local":
        assert facts["left_out"]["broken"]["first"] == [f"{place.source}/back\\slash.png"]
    unlabeled = place.part("unlabeled")
    assert all(storage.exists(unlabeled.uri(n)) for n in range(len(unlabeled)))
    place.commit()
    assert place.collect()["new"] == 0


def test_links_do_not_leave_the_source(local, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(50))
    local.put("10.png", picture(10))
    Path(local.source, "link.png").symlink_to(tmp_path / "secret.png")
    Path(local.source, "nowhere.png").symlink_to(tmp_path / "nowhere.png")
    facts = local.collect(max_bad_images=1)
    assert local.names(new=True) == ["10.png"]
    assert facts["left_out"]["broken"]["images"] == 2


def test_two_commits_at_once(place):
    """Both found the same state; one wins, the other is told, and only the winner's round stands."""
    place.put("10.png", picture(10))
    place.collect()
    one = place.pending
    place.put("11.png", picture(11))
    place.collect()
    two = place.pending
    barrier, told = threading.Barrier(2), {}

    def move(name: str, pending: str) -> None:
        barrier.wait()
        try:
            told[name] = commit(place.state, pending, accepted=True, run=name)
        except Conflict as e:
            told[name] = e

    threads = [threading.Thread(target=move, args=pair) for pair in (("one", one), ("two", two))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = next(name for name, answer in told.items() if isinstance(answer, dict))
    loser = told[{"one": "two", "two": "one"}[winner]]
    assert isinstance(loser, Conflict)
    assert "run `softteacher collect` again" in str(loser)
    assert [r["run"] for r in State.read(place.state).rounds] == [winner]
    # no index is left that nobody names
    assert {f.name for f in storage.list_files(place.state)} == {"state.json", place_index(place)}


def test_the_pointer_is_written_conditionally(place, monkeypatch):
    """The state moves between the reading and the writing of a commit: a real 412 of the store."""
    place.put("10.png", picture(10))
    place.collect()
    late = place.pending
    place.put("11.png", picture(11))
    place.collect()
    real = State.images

    def slow(self: State) -> object:
        monkeypatch.setattr(State, "images", real)
        place.commit(run="first")
        return real(self)

    monkeypatch.setattr(State, "images", slow)
    with pytest.raises(Conflict, match="in this moment"):
        commit(place.state, late, accepted=True, run="second")
    assert [r["run"] for r in State.read(place.state).rounds] == ["first"]
    assert {f.name for f in storage.list_files(place.state)} == {"state.json", place_index(place)}


def test_a_commit_twice_is_one(local):
    local.put("10.png", picture(10))
    local.collect()
    first = local.commit(accepted=False, run="a")
    assert local.commit(accepted=True, run="b") == first
    assert [(r["run"], r["accepted"]) for r in State.read(local.state).rounds] == [("a", False)]


def test_old_indices_go(local):
    for n in range(10, 14):
        local.put(f"{n}.png", picture(n))
        local.collect()
        local.commit()
    now = State.read(local.state)
    assert {f.name for f in storage.list_files(local.state)} == {"state.json", now.index, now.previous}


@pytest.mark.parametrize("name", ["state.json", "index"])
def test_a_torn_state_is_named(local, name):
    local.put("10.png", picture(10))
    local.collect()
    local.commit()
    path = Path(local.state, place_index(local) if name == "index" else name)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{path.name}: torn, or n.* ours"):
        local.collect()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_new": -1}, "--min-new -1: must be 0 or more"),
        ({"near_duplicate_bits": 200}, "--near-duplicate-bits 200: must be from -1"),
        ({"max_bad_images": 2}, "--max-bad-images 2: must be from 0 to 1"),
        ({"labels": ["/nowhere.json"]}, "/nowhere.json: no such file"),
    ],
)
def test_bad_arguments(local, options, message):
    local.put("10.png", picture(10))
    with pytest.raises(UserError, match=message):
        local.collect(**options)


def test_no_such_source(local):
    with pytest.raises(UserError, match="incoming: no such folder; check --source"):
        local.collect()


def test_shards_give_what_one_process_gives(local, tmp_path):
    for n in range(10, 17):
        local.put(f"{n}.png", picture(n))
    local.put("twin.jpg", picture(16, "JPEG"))
    local.put("bad.png", b"x")
    local.collect()
    made = str(tmp_path / "plan")
    told = plan(local.source, local.state, made, base=local.base, shards=3)
    assert told == {"shards": 3, "images": 16, "to_look_at": 16}
    hashes = [str(tmp_path / f"hashes-{n}") for n in (2, 0, 1)]
    seen = [hash_shard(made, n, out) for n, out in zip((2, 0, 1), hashes, strict=True)]
    assert sum(s["images"] for s in seen) == 16
    merge(made, hashes, str(tmp_path / "merged"))
    assert files(str(tmp_path / "merged")) == files(local.pending)
    for wrong in (hashes[:2], [*hashes, hashes[0]], [hashes[0], hashes[0], hashes[1]]):
        with pytest.raises(UserError, match="needs each of its 3 shards once"):
            merge(made, wrong, str(tmp_path / "wrong"))
    with pytest.raises(UserError, match="shard-3"):
        hash_shard(made, 3, str(tmp_path / "none"))
    assert plan(local.source, local.state, made, base=local.base, shards=99)["shards"] == 16


def test_an_image_that_vanishes_while_it_is_looked_at(local, tmp_path):
    local.put("10.png", picture(10))
    local.put("11.png", picture(11))
    made, hashes, out = (str(tmp_path / name) for name in ("plan", "hashes", "out"))
    plan(local.source, local.state, made, base=local.base)
    storage.remove(f"{local.source}/11.png")
    assert hash_shard(made, 0, hashes)["vanished"] == 1
    assert merge(made, [hashes], out)["new"] == 1
    commit(local.state, out, accepted=True)
    local.put("11.png", picture(11))
    assert local.collect()["new"] == 1


def test_twenty_thousand_keys(local, monkeypatch):
    """A listing as S3 gives it, and a state of as many images: what is not new costs nothing to speak of."""
    count, looks = 20_000, []
    keys = [storage.FileInfo(f"{n:06d}.png", 100, f'"{n}"') for n in range(count)]
    listing, reading = storage.list_files, storage.read_bytes

    def look(data: bytes, name: str) -> Look:
        looks.append(name)
        digest = hashlib.sha256(name.encode()).digest()
        return Look(digest, digest[::-1], 10, 10)

    monkeypatch.setattr(storage, "list_files", lambda uri: iter(keys) if str(uri) == local.source else listing(uri))
    monkeypatch.setattr(storage, "read_bytes", lambda uri: b"" if local.source in str(uri) else reading(uri))
    monkeypatch.setattr(module, "look", look)
    Path(local.source).mkdir(parents=True)
    assert local.collect()["new"] == count
    assert len(looks) == count + 7
    local.commit()
    keys.append(storage.FileInfo("late.png", 100, '"x"'))
    started = time.process_time()
    facts = local.collect()
    assert time.process_time() - started < 10
    assert (facts["new"], facts["of_earlier_rounds"], looks[count + 7 :]) == (1, count, [f"{local.source}/late.png"])
