//! Why a boundary did not come to life, or ended.

use std::{fmt, io};

/// A step that failed, with what the guest printed last.
#[derive(Debug)]
pub struct VmmError {
    /// What was being done.
    pub stage: Stage,
    /// The tail of the guest's console; empty when it printed nothing.
    pub console: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// The steps of a boundary's start, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Files, descriptors and arguments for QEMU.
    Prepare,
    /// QEMU's process.
    Spawn,
    /// Its control socket (QMP).
    Control,
    /// Loading a template's device state into a clone.
    Load,
    /// Waiting for the agent's first bytes.
    Hello,
    /// Stopping the template and saving it.
    Save,
}

impl VmmError {
    /// `source` stopped `stage`.
    pub fn new(stage: Stage, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { stage, console: String::new(), source: source.into() }
    }

    /// The same error with what the console said.
    #[must_use]
    pub fn with_console(mut self, console: String) -> Self {
        self.console = console;
        self
    }
}

/// For `map_err`: wraps any error as one of `stage`.
pub(crate) fn at<E>(stage: Stage) -> impl FnOnce(E) -> VmmError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |source| VmmError::new(stage, source)
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Prepare => "prepare the virtual machine",
            Stage::Spawn => "start QEMU",
            Stage::Control => "talk to QEMU",
            Stage::Load => "load the template into a clone",
            Stage::Hello => "wait for the guest's agent",
            Stage::Save => "save the template",
        })
    }
}

impl fmt::Display for VmmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.stage)?;
        f.write_str(&last_words(&self.console))
    }
}

/// What stands of a console at the end of an error; nothing when it is empty.
pub fn last_words(console: &str) -> String {
    match console.trim() {
        "" => String::new(),
        text => format!(" (the guest's console ends with: {})", last_lines(text, 6)),
    }
}

impl std::error::Error for VmmError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.source.as_ref())
    }
}

impl From<VmmError> for io::Error {
    fn from(error: VmmError) -> Self {
        io::Error::other(error)
    }
}

/// What matters most of `text`, joined by " | " because an error is one line of a log: a panic's first
/// lines, or else the last `count`.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> =
        text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let panic = lines.iter().position(|line| line.contains("Kernel panic"));
    let first = panic.unwrap_or_else(|| lines.len().saturating_sub(count));
    lines[first..].iter().take(count).copied().collect::<Vec<_>>().join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_before_its_call_trace() {
        let trace = "frame\n".repeat(20);
        let console = format!("booting\r\nKernel panic - not syncing: no init\r\n{trace}");
        let error = VmmError::new(Stage::Hello, "gone").with_console(console);
        assert!(error.to_string().contains("ends with: Kernel panic"), "{error}");
    }
}
