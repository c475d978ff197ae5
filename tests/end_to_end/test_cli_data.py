"""`condit data check`."""

import json

import pytest
from PIL import Image

from condit.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_data_check_counts_pairs_and_quotes_what_is_wrong(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "x", "style_file_name": "a.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert run(capsys, "data", "check", str(tmp_path)) == (0, "1 pairs; with references: style 1\n", "")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row | {"file_name": "b.png"}) + "\n")
    code, out, err = run(capsys, "data", "check", str(tmp_path))
    assert code == 1 and "metadata.jsonl:1: file_name: no file 'b.png'" in err and '"text": "x"' in err
    code, out, _ = run(capsys, "data", "check", str(tmp_path), "--json")
    assert code == 1 and json.loads(out)["problems"]
    code, _, err = run(capsys, "data", "check", str(tmp_path / "none"))
    assert code == 1 and "metadata.jsonl" in err
