"""Functions of the user's own, out of files."""

import os

from dirl_cli.reward.functions import find_function


def test_a_file_is_read_anew_though_its_size_and_second_are_the_same(tmp_path):
    file = tmp_path / "mine.py"
    for value in (1, 2):
        file.write_text(f"def mine():\n    return {value}\n")
        os.utime(file, (1_000_000_000, 1_000_000_000))
        assert find_function(f"{file}:mine", "scorer")() == value
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
