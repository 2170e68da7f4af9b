//! One container: what it is to be ([`spec`]) and what is known of it ([`record`]).
//!
//! ```text
//! Creating --created--> Created --started--> Running --exit--> Exited --remove--> Removing --> gone
//!     \________failed_______x       \____________exit, boundary's end____^
//! ```
//!
//! The shim owns the process and is asked for the truth; the sandbox's driver is the only one who
//! changes a record.

pub mod record;
pub mod spec;

pub use record::{ContainerRecord, Exit, Phase};
pub use spec::ContainerSpec;
