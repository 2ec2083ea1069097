"""A server of the Model Context Protocol: other assistants search the business's sources, or ask its experts.

It speaks for one reader, named when it is started: whoever can start it can read what that reader may.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.answer import Answerer
from coterie.business import Business, Tell
from coterie.engine.request import Sampling
from coterie.errors import CoterieError
from coterie.grounding import Grounded, Grounding
from coterie.knowledge.evidence import Reader
from coterie.sources import Knowledge

if TYPE_CHECKING:
    from mcp.server import MCPServer


def server(business: Business, reader: Reader, tell: Tell = lambda _: None) -> "MCPServer":
    """The server, its tools not started. Raises CoterieError where the extra is not installed."""
    try:
        from mcp.server import MCPServer
    except ImportError as error:
        raise CoterieError("the MCP server needs an extra: pip install 'coterie[mcp]'") from error
    made = MCPServer(business.config.business.name)
    knowledge = Knowledge(business, tell=tell)
    opened: list[Grounding] = []  # the model is loaded when it is first asked

    @made.tool()
    def search(question: str) -> dict[str, Any]:
        """Passages, rows and triples that say something about a question, the best of each source first; and which
        sources could not be asked."""
        problems: list[str] = []
        found = knowledge.gather(question, reader, tell=problems.append)
        return {"sources": Grounded(found, True, []).sources(), "problems": problems}

    @made.tool()
    def ask(question: str, expert: str = "auto", max_tokens: int = 200) -> dict[str, Any]:
        """An answer from the business's sources, with the source of each sentence; [?] marks what no source says."""
        if not opened:
            opened.append(Grounding(Answerer.open(business, tell), knowledge))
        said, grounded = "", None
        for part in opened[0].answer(expert, question, reader, Sampling(max_tokens), tell=tell):
            if isinstance(part, Grounded):
                grounded = part
            else:
                said += part
        assert grounded is not None
        return {
            "text": said.strip(),
            "known": grounded.known,
            "sources": grounded.sources(),
            "problems": grounded.problems,
        }

    return made


def serve(folder: Path, reader: Reader, tell: Tell) -> None:
    """Serve on stdin and stdout until the client leaves."""
    server(Business.open(folder), reader, tell).run("stdio")
