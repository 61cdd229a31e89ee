"""What crosses ranks: token statistics (vocab.py), sums over tokens (context.py), scores of groups (groups.py)."""
