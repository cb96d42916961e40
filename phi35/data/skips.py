"""Documents that training passes over, each with the reason under which it is counted."""

REASONS = {
    "broken_json": "a line or member that is not JSON",
    "bad_utf8": "bytes or text that are not UTF-8",
    "too_large": "a document above the limit of bytes",
    "unreadable": "a file that could not be read",
    "unreadable_shard": "a file that is no uncompressed tar",
    "truncated_shard": "a tar that ends before its last member does",
    "foreign_member": "a member of a tar that is no document: another suffix, a path that leaves its folder, a link",
    "outside_link": "a link that leads out of the data folder",
    "missing_text": "a record without the text field, or whose text is no string",
    "empty": "a text without a token",
    "bad_messages": "a chat of another form, or that the template refuses",
    "no_reply": "a chat in which no assistant says anything",
    "control_token": "a chat that holds the template's control tokens as text",
    "too_long": "a chat longer than a row",
    "shortened": "a chat of which the last turns were left out to fit a row",
    "bad_images": "pictures that cannot be read, or that the model does not take",
    "equal_replies": "a pair of replies that are the same",
    "bad_tokens": "stored tokens beyond the model's vocabulary",
}
"""Why documents are left out, by the key under which they are counted ("shortened" ones are used in part)."""


class SkippedDocument(ValueError):
    """A document that cannot be used.

    Attributes:
        reason: a key of ``REASONS``.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason
