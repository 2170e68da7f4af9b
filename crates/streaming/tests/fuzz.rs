//! Damaged SPDY, a little of it. For more: `cargo run --release --example fuzz -- 10000000`.

#[path = "common/fuzz.rs"]
mod fuzz;

#[test]
fn damaged_frames_stay_within_their_bounds() {
    let count = if cfg!(debug_assertions) { 20_000 } else { 200_000 };
    let report = fuzz::run(count, 1);
    // Otherwise nothing is tested.
    assert!(report.frames > count && report.headers > count / 4, "{report:?}");
    assert!(report.refused > count / 10, "{report:?}");
}
