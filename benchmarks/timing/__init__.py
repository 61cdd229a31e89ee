"""How ops are timed beside their rivals: shapes, measurements, rows, tables."""
