"""The formats themselves: tiles, settings, what scales can hold. No files, no network, no devices."""
