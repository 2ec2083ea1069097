"""LlamaIndex with its default in-memory stores, over texts and vectors that are given: index, then ask one by one.

Run by the interpreter of an environment that has llama-index-core; prints one JSON object.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import TextNode


class Known(BaseEmbedding):
    """Gives the vectors that are known already, in the order of asking."""

    table: dict[str, Any]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self.table[query]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self.table[query]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.table[text]


def main() -> None:
    work = Path(sys.argv[1])
    texts, questions = (json.loads((work / f"{name}.json").read_text()) for name in ("texts", "questions"))
    vectors, asked = np.load(work / "vectors.npy").tolist(), np.load(work / "asked.npy").tolist()
    Settings.llm = None
    known = Known(table=dict(zip(questions, asked, strict=True)))
    start = time.perf_counter()
    nodes = [TextNode(id_=str(i), text=t, embedding=v) for i, (t, v) in enumerate(zip(texts, vectors, strict=True))]
    index = VectorStoreIndex(nodes, embed_model=known)
    indexing = time.perf_counter() - start
    retriever = index.as_retriever(similarity_top_k=10)
    retriever.retrieve(questions[0])
    seconds, found = [], []
    for question in questions:
        start = time.perf_counter()
        nodes_ = retriever.retrieve(question)
        seconds.append(time.perf_counter() - start)
        found.append([int(n.node.node_id) for n in nodes_])
    print(json.dumps({"index_s": indexing, "query_s": seconds, "found": found}))


if __name__ == "__main__":
    main()
