"""Reading and checking data in COCO's layout, and loading batches of it."""
