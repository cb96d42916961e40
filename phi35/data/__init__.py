"""Text for training: documents, their tokens, packed rows, and the endless stream of batches."""
