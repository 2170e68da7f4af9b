//! Frames and header blocks: however the bytes are cut, the same comes out, within its bounds.

#![no_main]

#[allow(dead_code)]
#[path = "../../tests/common/fuzz.rs"]
mod fuzz;

use libfuzzer_sys::fuzz_target;

// The first bytes say where the others are cut.
fuzz_target!(|input: (&[u8], Vec<usize>)| {
    let (bytes, cuts) = input;
    fuzz::check(bytes, &cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect::<Vec<_>>());
});
