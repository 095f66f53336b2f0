"""What every error must be, whatever raised it."""


def check_sentence(error: Exception) -> None:
    """An error says in one sentence what is wrong, and is no assertion of ours or of torch."""
    message = str(error)
    assert message, f"{type(error).__name__} without a sentence"
    assert "\n" not in message, f"more than one sentence: {message}"
    assert "assert" not in message.lower(), f"an assertion: {message}"
