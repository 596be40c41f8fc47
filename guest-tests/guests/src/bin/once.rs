//! Touches each page a single time in a shuffled order, so that every touch after a handoff is a cold one.

#![no_std]
#![no_main]

switchover_guests::guest!(switchover_guests::workload::Once);
