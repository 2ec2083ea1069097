"""A process of its own that asks a graph: `python -m coterie.knowledge.graph_worker BYTES`, a question a line, as JSON.

Apart, because a SPARQL query cannot be stopped inside a process; this one can be killed, and ends by itself where a
query needs more memory than BYTES. It opens a snapshot, which nobody writes, and keeps it open until another is asked
for. It imports nothing heavy, to start in a tenth of a second.
"""

import json
import resource
import sys
from typing import Any

import pyoxigraph as ox


def answer(store: ox.Store, job: dict[str, Any]) -> dict[str, Any]:
    """SPARQL 1.1 Query Results JSON, of one row more than the limit at most."""
    graphs = [ox.NamedNode(g) for g in job["graphs"]]
    found = store.query(job["query"], default_graph=graphs, named_graphs=graphs)  # type: ignore[arg-type]
    if isinstance(found, ox.QueryBoolean):
        return {"boolean": bool(found)}
    assert isinstance(found, ox.QuerySolutions)
    names, rows = [v.value for v in found.variables], []
    for solution in found:
        rows.append({n: term(value) for n in names if (value := solution[n]) is not None})
        if len(rows) > job["limit"]:
            break
    return {"head": {"vars": names}, "results": {"bindings": rows}}


def term(value: Any) -> dict[str, str]:
    """One value, as the JSON format writes it."""
    if isinstance(value, ox.NamedNode):
        return {"type": "uri", "value": value.value}
    if isinstance(value, ox.BlankNode):
        return {"type": "bnode", "value": value.value}
    if isinstance(value, ox.Literal):
        text = "http://www.w3.org/2001/XMLSchema#string"
        if value.language:
            return {"type": "literal", "value": value.value, "xml:lang": value.language}
        kind = {} if value.datatype.value == text else {"datatype": value.datatype.value}
        return {"type": "literal", "value": value.value, **kind}
    return {"type": "literal", "value": str(value)}


def main() -> None:
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # of its own; the files of the graph are mapped beside
    opened, store = "", None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if store is None or opened != job["snapshot"]:
                opened = job["snapshot"]
                store = ox.Store.read_only(opened) if opened else ox.Store()
            out = answer(store, job)
        except (OSError, SyntaxError, ValueError) as error:
            out = {"error": str(error), "kind": "refused" if isinstance(error, SyntaxError) else "failed"}
        print(json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
