"""Bad input to any command is one line and exit code 2, and leaves nothing behind."""

import shutil

import pytest

from tests.samples import TINY, coco_tree, write_coco, write_json


def bad(tmp_path, name):
    """The arguments of a command with one thing wrong."""
    tree = coco_tree()
    folder = tmp_path / "in"
    write_coco(folder)
    split = ["split", "--data", folder, "--percent", "25", "--out", tmp_path / "out"]
    train = ["train", "--labeled", folder / "annotations" / "instances_train.json", "--method", "supervised"]
    train += ["--validation", folder / "annotations" / "instances_val.json", "--preset", "demo"]
    train += [part for override in TINY for part in ("--set", override)]
    train += ["--out", tmp_path / "out"]
    file = folder / "annotations" / "instances_train.json"
    endpoint = ["--triton", "http://127.0.0.1:9", "--name", "x", "--repository", tmp_path / "out"]
    predict = ["predict", "--triton", "http://127.0.0.1:9", "--name", "x", folder / "images" / "1.png"]
    predict += ["--format", "json"]
    match name:
        case "no data":
            split[2] = "/nowhere"
        case "no json":
            shutil.rmtree(folder / "annotations")
        case "broken json":
            file.write_text("{")
        case "missing key":
            write_json(file, {"images": tree["images"]})
        case "zero boxes":
            write_json(file, tree | {"annotations": []})
        case "class sets":
            write_json(file, tree | {"categories": [*tree["categories"], {"id": 5, "name": "cow"}]})
        case "leaves":
            tree["images"][2]["file_name"] = "../../secret.png"
            write_json(file, tree)
        case "leaves by link":
            (folder / "images" / "3.png").unlink()
            (folder / "images" / "3.png").symlink_to("/etc/hostname")
        case "two broken images":
            for n in (1, 2):
                (folder / "images" / f"{n}.png").write_bytes(b"")
        case "percent":
            split[4] = "100"
        case "out is a file":
            (tmp_path / "out").write_text("precious")
        case "out under a file":
            (tmp_path / "file").write_text("precious")
            split[6] = tmp_path / "file" / "out"
        case "no s3":
            split[2] = "s3://bucket/data"
        case "no s3 for the output":
            split[6] = "s3://bucket/out"
        case "bad s3 uri":
            split[2] = "s3://"
        case "another store":
            split[6] = "gs://bucket/out"
        case "one slash":
            split[2] = "s3:/bucket/data"
        case "capitals":
            train[2] = "S3://bucket/labeled.json"
            return train
        case "file URI":
            return [*predict[:5], f"file://{folder}/images/1.png"]
        case "demo in a bucket":
            return ["demo", "--out", "s3://bucket/demo"]
        case "unknown setting":
            return [*train, "--set", "training.iteration=5"]
        case "unknown preset":
            return [*train, "--preset", "demos"]
        case "bad value":
            return [*train, "--set", "training.lr=fast"]
        case "no model":
            return ["evaluate", "--model", folder, "--data", file, "--out", tmp_path / "out"]
        case "no model to export":
            return ["export", "--model", "/nowhere", "--out", tmp_path / "out"]
        case "no triton":
            return predict
        case "no image":
            return ["predict", "--triton", "http://127.0.0.1:9", "--name", "x", "/nowhere.png"]
        case "output is a folder":
            return [*predict, "--output", folder]
        case "output is an image":
            (tmp_path / "link").symlink_to(folder)
            return [*predict, "--output", tmp_path / "link" / "images" / "1.png"]
        case "output is a part":
            (tmp_path / "a.json").write_text("[]")
            return [*predict, "--output", tmp_path / "a.json", "--join", tmp_path / "a.json"]
        case "deploy nothing":
            return ["deploy", "--onnx", "/nowhere", *endpoint]
        case "canary of all":
            return ["deploy", "--onnx", "/nowhere", "--canary", "100%", *endpoint]
        case "rollback without triton":
            return ["rollback", *endpoint]
        case "promote without triton":
            return ["promote", *endpoint]
        case "status of nothing":
            return ["status", *endpoint[:-1], "s3://bucket/models"]
        case "status in a typo":
            return ["status", *endpoint[:-1], "/nowhere/typo"]
        case "localhost:abc" | "localhost:99999" | "http://[::1":
            return ["rollback", "--triton", name, *endpoint[2:]]
        case "predict as another name":
            return ["predict", "--triton", "http://127.0.0.1:9", "--name", "a/b", folder / "images" / "1.png"]
        case "shard in a table":
            return ["predict", *endpoint[:4], "--shard", "1/2", folder / "images"]
        case "demo into a file":
            (tmp_path / "file").write_text("precious")
            return ["demo", "--out", tmp_path / "file"]
    return split


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no data", "/nowhere: no such folder or prefix"),
        ("no json", "needs annotations/instances_train.json"),
        ("broken json", "instances_train.json: broken json"),
        ("missing key", "no key 'annotations'"),
        ("zero boxes", "not one labelled box"),
        ("class sets", "the class sets differ"),
        ("leaves", "image 3: file_name '../../secret.png' leaves the image folder"),
        ("leaves by link", "image 3: file_name '3.png' leaves the image folder by a link"),
        ("two broken images", "2 of 8 images are missing or broken, 1 allowed"),
        ("percent", "--percent 100: leaves no unlabelled image; give others with --unlabeled"),
        ("out is a file", "out: is a file, but a folder is needed"),
        ("out under a file", "is a file where a folder is needed"),
        ("no s3", "s3://bucket/data: S3 at http://127.0.0.1:9 can't be reached"),
        ("no s3 for the output", "s3://bucket/out: S3 at http://127.0.0.1:9 can't be reached"),
        ("bad s3 uri", "no bucket in the S3 URI"),
        ("another store", "gs://bucket/out/labeled.json: only local paths and s3://bucket/key are supported"),
        ("one slash", "s3:/bucket/data: only local paths"),
        ("capitals", "S3://bucket/labeled.json: only local paths"),
        ("file URI", "images/1.png: only local paths"),
        ("demo in a bucket", "--out s3://bucket/demo: the demo writes to this machine"),
        ("unknown setting", "training.iteration: no such setting; did you mean training.iterations?"),
        ("unknown preset", "did you mean demo?"),
        ("bad value", "training.lr = 'fast'"),
        ("no model", "is no model folder"),
        ("no model to export", "/nowhere: no such file or folder"),
        ("no triton", "Triton at http://127.0.0.1:9 can't be reached"),
        ("no image", "/nowhere.png: no such file"),
        ("output is a folder", "in: is a folder, but a file is needed for the output"),
        ("output is an image", "1.png: is one of the inputs, the answers would replace it"),
        ("output is a part", "a.json: is one of the inputs, the answers would replace it"),
        ("deploy nothing", "/nowhere: no such file or folder"),
        ("canary of all", "--canary 100%: is no share of the requests; write 10% or 0.1"),
        ("rollback without triton", "Triton at http://127.0.0.1:9 can't be reached"),
        ("promote without triton", "Triton at http://127.0.0.1:9 can't be reached"),
        ("status of nothing", "S3 at http://127.0.0.1:9 can't be reached"),
        ("status in a typo", "/nowhere/typo: no such folder, nor one around it; check --repository"),
        ("localhost:abc", "localhost:abc: not a URL of Triton; write http://host:port"),
        ("localhost:99999", "localhost:99999: not a URL of Triton"),
        ("http://[::1", "http://[::1: not a URL of Triton"),
        ("predict as another name", "--name a/b: only letters"),
        ("shard in a table", "--shard 1/2: only JSON can be joined; add --format json --output FILE"),
        ("demo into a file", "file: can't be a folder (File exists); choose another"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    arguments = bad(tmp_path, name)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*arguments)
    errors = [line for line in err if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1
    assert err[-1] == errors[0]
    assert message in errors[0]
    assert "Traceback" not in "\n".join(err)
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before
