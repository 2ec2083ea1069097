"""LlamaIndex as it is by default: documents split and kept in its in-memory stores, their vectors given; then asked
one by one.

Run by the interpreter of an environment that has llama-index-core; prints one JSON object.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding


class Known(BaseEmbedding):
    """Gives the vectors that are known already, in the order of asking."""

    table: dict[str, Any]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self.table[query]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self.table[query]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.table[text.strip()]


def main() -> None:
    work = Path(sys.argv[1])
    texts, questions = (json.loads((work / f"{name}.json").read_text()) for name in ("texts", "questions"))
    vectors, asked = np.load(work / "vectors.npy").tolist(), np.load(work / "asked.npy").tolist()
    Settings.llm = None
    known = Known(table=dict(zip([*questions, *(t.strip() for t in texts)], [*asked, *vectors], strict=True)))
    start = time.perf_counter()
    documents = [Document(id_=str(i), text=t) for i, t in enumerate(texts)]
    index = VectorStoreIndex.from_documents(documents, embed_model=known)
    indexing = time.perf_counter() - start
    retriever = index.as_retriever(similarity_top_k=10)
    retriever.retrieve(questions[0])
    seconds, found = [], []
    for question in questions:
        start = time.perf_counter()
        nodes_ = retriever.retrieve(question)
        seconds.append(time.perf_counter() - start)
        found.append([int(n.node.ref_doc_id) for n in nodes_])
    print(json.dumps({"index_s": indexing, "query_s": seconds, "found": found}))


if __name__ == "__main__":
    main()
