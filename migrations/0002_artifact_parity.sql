-- JSON: how close an artifact, read back, is to what was trained; null for artifacts from before this column.
alter table artifact add column parity text;
