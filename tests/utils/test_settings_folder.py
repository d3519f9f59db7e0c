"""Folders with settings: what is refused of what is there."""

import pytest

from dylo_moe.utils.settings_folder import refuse_foreign


def test_a_file_in_place_of_the_folder_is_called_a_file(tmp_path):
    """It was called not empty."""
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ValueError, match=r"README.md is a file; name a new folder"):
        refuse_foreign(tmp_path / "README.md", what="evaluation")
