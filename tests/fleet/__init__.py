"""Tests of marlin_convert.fleet."""
