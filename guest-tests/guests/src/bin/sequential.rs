//! Writes its pages one after another, from the first to the last and again.

#![no_std]
#![no_main]

switchover_guests::guest!(switchover_guests::workload::Sequential);
