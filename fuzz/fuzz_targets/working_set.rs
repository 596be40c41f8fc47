#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| switchover_properties::working_set(bytes));
