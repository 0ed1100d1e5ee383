"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake that the user can mend.

    Its text is one sentence that says what was given, what is needed and what to do.
    """

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))  # a quoted library error may have many lines

    def _render_traceback_(self) -> list[str]:
        """Show the sentence alone in Jupyter and Colab, without a traceback."""
        return [f"dlsr: {self}"]
