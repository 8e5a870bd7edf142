"""Federated tuning on Flower: many clients teach one adapter or head, and their texts stay where they are."""
