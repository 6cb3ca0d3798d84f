"""The attribution page of an exported model."""

from __future__ import annotations

from pathlib import Path

from train.config import load_config
from train.release.card import attribution_page


def test_attribution_names_all_authors_of_the_training_text():
    def entry(documents: int, authors: list[str], attribution: str) -> dict:
        train = {"documents": documents, "licences": ["CC-BY-4.0", "CC-BY"], "author_names": authors}
        return {"source": "file.parquet", "attribution": attribution, "train": train}

    manifest = {
        "books": entry(5, ["Ann Bee", "Cé\n Dee"], "Picture books"),
        "tales": entry(5, [], ""),
        "held": entry(0, ["Not Trained On"], "Others"),
    }
    page = attribution_page(load_config(Path("configs/train-demo.yaml")), manifest)
    books, tales = page.split("## tales")
    assert "Picture books\n\nLicence: CC-BY-4.0; CC-BY\n\nAuthors (2):\n\n- Ann Bee\n- Cé Dee\n" in books
    assert "file.parquet" in tales
    assert "No author is named" in tales
    assert "Not Trained On" not in page
