//! Who runs first.

use std::io;

/// The calling thread runs as soon as it has something to do, before all threads that are not `urgent`
/// (`SCHED_FIFO`), or in its turn (`SCHED_OTHER`).
///
/// # Errors
/// Without `CAP_SYS_NICE`.
pub fn urgent(urgent: bool) -> io::Result<()> {
    let (policy, sched_priority) = match urgent {
        true => (libc::SCHED_FIFO, 1),
        false => (libc::SCHED_OTHER, 0),
    };
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: the parameters live as long as the call; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> libc::c_int {
        // SAFETY: takes an integer only; 0 is the calling thread.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn a_thread_comes_first_and_in_its_turn_again() {
        let before = policy();
        urgent(true).unwrap();
        assert_eq!(policy(), libc::SCHED_FIFO);
        urgent(false).unwrap();
        assert_eq!((policy(), before), (libc::SCHED_OTHER, libc::SCHED_OTHER));
    }
}
