"""What the tests of knowledge share: an embedder that needs no weights, and small documents of each kind."""

import hashlib
import io
import re
from collections.abc import Sequence

import docx
import numpy as np
from numpy.typing import NDArray

POLICY = """# House rules

We repair bikes.

## Delivery
Standard delivery takes 3 days and costs 4 pounds.

## Returns
Unused items can be returned within 30 days.
"""
PAGE = b"""<html><head><title>Opening hours</title><style>p{color:red}</style></head><body><nav>Home | Shop</nav>
<article><h1>Opening hours</h1><p>The workshop opens at nine in the morning, from Monday to Friday.</p>
<h2>Holidays</h2><p>On public holidays the workshop stays closed the whole day.</p></article>
<script>alert('never shown')</script></body></html>"""


class WordEmbedder:
    """A vector of hashed words: alike texts lie near each other. Counts what it is asked."""

    name, width = "words", 64

    def __init__(self) -> None:
        self.asked = 0

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += len(texts)
        out = np.full((len(texts), self.width), 1e-3, np.float32)
        for row, text in zip(out, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[int(hashlib.md5(word.encode()).hexdigest(), 16) % self.width] += 1
        return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True), np.float32)


def pdf_of(*pages: str) -> bytes:
    """A PDF with a line of text on each page."""
    count = len(pages)
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(count))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {count} >>"]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 40 700 Td ({text}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {4 + 2 * i} 0 R "
            "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{at:010d} 00000 n \n" for at in places)
    head = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}"
    return out + f"{head}trailer\n<< /Size {len(places) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n".encode()


def docx_of(*parts: tuple[str, str]) -> bytes:
    """A DOCX of headings and the paragraph under each."""
    document = docx.Document()
    for heading, text in parts:
        document.add_heading(heading, level=1)
        document.add_paragraph(text)
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "chain", "12 pounds"
    packed = io.BytesIO()
    document.save(packed)
    return packed.getvalue()
