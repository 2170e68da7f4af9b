//! Installs a seccomp filter that was compiled elsewhere.

use std::io;

/// Size of one BPF instruction in a compiled filter.
pub const INSTRUCTION: usize = size_of::<libc::sock_filter>();

/// Installs `program` (the bytes of `struct sock_filter`s) for the caller and what it executes.
/// Needs CAP_SYS_ADMIN or no_new_privs. `flags` are the kernel's SECCOMP_FILTER_FLAG_*.
pub fn install(program: &[u8], flags: u64) -> io::Result<()> {
    let count = program.len() / INSTRUCTION;
    if !program.len().is_multiple_of(INSTRUCTION) || count == 0 || count > usize::from(u16::MAX) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let filter: Vec<libc::sock_filter> = program
        .chunks_exact(INSTRUCTION)
        .map(|i| libc::sock_filter {
            code: u16::from_ne_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
        })
        .collect();
    let program = libc::sock_fprog { len: count as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program points to `count` instructions that outlive the call; the kernel copies
    // and checks them.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
