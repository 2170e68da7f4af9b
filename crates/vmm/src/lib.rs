//! QEMU as a pod's boundary: boot, template, clone, console, end.
//!
//! ```text
//!   boot ──────────────▶ running ──▶ ended
//!   boot ─▶ template (folder) ─▶ clone ─▶ running ──▶ ended
//! ```
//!
//! A **template** is a guest that was booted once, stopped when its agent was ready, and saved:
//! memory, device state (without memory) and disk. A **clone** maps the memory privately, loads the
//! state and goes on from there, so it is ready in the time QEMU takes to start.
//!
//! **The hello.** Besides lanes the guest has two virtio-serial ports, `agent` and `volumes`. On each it
//! waits until the host's end is open. On `agent` it then writes [`HELLO`] and serves one HTTP/2
//! connection until the host closes; the host is silent until it has read the hello. Building a
//! template, the host reads the hello, closes both ends, lets the guest see that, and only then
//! stops it: every clone finds a new host at its ports and says hello again.
//!
//! QEMU runs under a user id of its own, without capabilities, in its seccomp sandbox, and has
//! nothing but the descriptors it inherits; it dies with the thread that started it.
//!
//! Not here: what goes over the ports (shim, agent, volume), which template fits a pod (server).

mod command;
mod console;
pub mod disk;
mod error;
mod hardware;
mod madt;
mod qmp;
pub mod template;
mod vm;

pub use console::Console;
pub use error::{Stage, VmmError, last_words};
pub use hardware::{DiskAccess, Hardware, MoreMemory};
pub use vm::{HELLO, Vm, VmExit, VmParts, VmStreams, wait_hello};
