"""Several models judged together: compare, leaderboard, tables, published."""
