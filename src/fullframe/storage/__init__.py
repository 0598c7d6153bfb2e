"""Where maps live: regions and bytes only."""
