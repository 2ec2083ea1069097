"""Customer service: conversations that have one owner, an assistant that answers, people who take over."""
