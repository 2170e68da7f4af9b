//! Named places where a test makes the server die, or wait to be killed.
//!
//! Only in builds with the feature `failpoints`, from the environment: `FAILPOINTS='NAME=return'`
//! aborts the process there, `NAME=sleep(60000)` waits. The names are listed in docs/state.md.

/// Reads `FAILPOINTS`; keep the answer for as long as they shall work.
#[cfg(feature = "failpoints")]
pub fn init() -> fail::FailScenario<'static> {
    fail::FailScenario::setup()
}

/// Dies or waits here if the environment says so.
pub fn hit(name: &'static str) {
    fail::fail_point!(name, |_| std::process::abort());
    let _name = name;
}
