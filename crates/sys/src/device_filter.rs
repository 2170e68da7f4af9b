//! Device rules of a cgroup v2: a small eBPF program attached to the cgroup.

use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::io;

/// Which kind of device node a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Both.
    Any,
    /// Block devices.
    Block,
    /// Character devices.
    Char,
}

/// What a rule is about; the kernel's bits.
pub mod access {
    /// mknod.
    pub const MKNOD: u32 = 1;
    /// Open for reading.
    pub const READ: u32 = 2;
    /// Open for writing.
    pub const WRITE: u32 = 4;
    /// All of them.
    pub const ALL: u32 = MKNOD | READ | WRITE;
}

/// One rule. The last rule that fits a request decides; without one it is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Allow or deny.
    pub allow: bool,
    /// Kind of node.
    pub kind: Kind,
    /// `None`: any.
    pub major: Option<u32>,
    /// `None`: any.
    pub minor: Option<u32>,
    /// Bits of [`access`]. An allowing rule fits when it has all that is asked for, a denying one
    /// when it has any.
    pub access: u32,
}

/// struct bpf_insn.
#[repr(C)]
#[derive(Clone, Copy)]
struct Insn {
    code: u8,
    registers: u8, // destination in the low half, source in the high half
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const MOVE_IMMEDIATE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const AND: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x77; // BPF_ALU64 | BPF_RSH | BPF_K
const JUMP_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

const R0: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 0;

fn insn(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Insn {
    Insn { code, registers: destination | source << 4, offset, immediate }
}

/// The program: struct bpf_cgroup_dev_ctx { access_type, major, minor } in r1, answer in r0.
fn compile(rules: &[Rule]) -> Vec<Insn> {
    let mut program = vec![
        insn(LOAD_WORD, TYPE, CONTEXT, 0, 0),
        insn(AND, TYPE, 0, 0, 0xffff),
        insn(LOAD_WORD, ACCESS, CONTEXT, 0, 0),
        insn(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        insn(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        insn(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    // Backwards, so that the first fitting one is the last of the list.
    for rule in rules.iter().rev() {
        let mut tests = Vec::new(); // jumps out of the rule, their targets not yet known
        match rule.kind {
            Kind::Any => {}
            Kind::Block => tests.push(insn(JUMP_NOT_EQUAL, TYPE, 0, 0, 1)),
            Kind::Char => tests.push(insn(JUMP_NOT_EQUAL, TYPE, 0, 0, 2)),
        }
        if let Some(major) = rule.major {
            tests.push(insn(JUMP_NOT_EQUAL, MAJOR, 0, 0, major as i32));
        }
        if let Some(minor) = rule.minor {
            tests.push(insn(JUMP_NOT_EQUAL, MINOR, 0, 0, minor as i32));
        }
        tests.push(insn(MOVE, SCRATCH, ACCESS, 0, 0));
        if rule.allow {
            tests.push(insn(AND, SCRATCH, 0, 0, !(rule.access as i32)));
            tests.push(insn(JUMP_NOT_EQUAL, SCRATCH, 0, 0, 0));
        } else {
            tests.push(insn(AND, SCRATCH, 0, 0, rule.access as i32));
            tests.push(insn(JUMP_EQUAL, SCRATCH, 0, 0, 0));
        }
        let length = tests.len();
        for (at, test) in tests.iter_mut().enumerate() {
            if matches!(test.code, JUMP_EQUAL | JUMP_NOT_EQUAL) {
                // Over the rest of the tests and the two instructions of the verdict.
                test.offset = (length - at - 1 + 2) as i16;
            }
        }
        program.extend(tests);
        program.push(insn(MOVE_IMMEDIATE, R0, 0, 0, i32::from(rule.allow)));
        program.push(insn(EXIT, 0, 0, 0, 0));
    }
    program.push(insn(MOVE_IMMEDIATE, R0, 0, 0, 0));
    program.push(insn(EXIT, 0, 0, 0, 0));
    program
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

#[repr(C)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// Compiles `rules` and has the kernel check them, once for all cgroups that they are for.
pub fn load(rules: &[Rule]) -> io::Result<OwnedFd> {
    let program = compile(rules);
    let load = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the attribute points to the instructions and the licence, both outlive the call.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of_val(&load)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Enforces loaded rules on every process in `cgroup` (a descriptor of its folder) and below, until
/// the cgroup is removed.
pub fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let attach = AttachAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attribute holds two descriptors that are open.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of_val(&attach))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsFd;

    /// Runs the few instructions that `compile` writes.
    fn run(program: &[Insn], kind: u32, asked: u32, major: u32, minor: u32) -> bool {
        let context = [kind | asked << 16, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0usize;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            match i.code {
                LOAD_WORD => registers[to] = u64::from(context[i.offset as usize / 4]),
                MOVE => registers[to] = registers[from],
                MOVE_IMMEDIATE => registers[to] = i.immediate as u64,
                AND => registers[to] &= i.immediate as i64 as u64,
                SHIFT_RIGHT => registers[to] >>= i.immediate,
                JUMP_EQUAL if registers[to] == i.immediate as u64 => at += i.offset as usize,
                JUMP_NOT_EQUAL if registers[to] != i.immediate as u64 => at += i.offset as usize,
                JUMP_EQUAL | JUMP_NOT_EQUAL => {}
                EXIT => return registers[0] != 0,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    const CHAR: u32 = 2;
    const BLOCK: u32 = 1;

    #[test]
    fn the_last_fitting_rule_decides_and_none_denies() {
        let deny =
            Rule { allow: false, kind: Kind::Any, major: None, minor: None, access: access::ALL };
        let null = Rule {
            allow: true,
            kind: Kind::Char,
            major: Some(1),
            minor: Some(3),
            access: access::READ | access::WRITE,
        };
        let mknod = Rule {
            allow: true,
            kind: Kind::Block,
            major: None,
            minor: None,
            access: access::MKNOD,
        };
        let program = compile(&[deny, null, mknod]);
        assert!(run(&program, CHAR, access::READ, 1, 3));
        assert!(run(&program, CHAR, access::READ | access::WRITE, 1, 3));
        assert!(
            !run(&program, CHAR, access::READ | access::MKNOD, 1, 3),
            "asks for more than allowed"
        );
        assert!(!run(&program, CHAR, access::READ, 1, 5));
        assert!(!run(&program, BLOCK, access::READ, 1, 3));
        assert!(run(&program, BLOCK, access::MKNOD, 254, 0));
        assert!(!run(&compile(&[null, deny]), CHAR, access::READ, 1, 3), "denied later");
        assert!(!run(&compile(&[]), CHAR, access::READ, 1, 3));
    }

    #[test]
    fn the_kernel_takes_the_program() {
        let folder = std::path::Path::new("/sys/fs/cgroup");
        let root = [folder.join("unified"), folder.to_owned()]
            .into_iter()
            .find(|root| root.join("cgroup.controllers").exists());
        let Some(root) = root else { return };
        let cgroup = root.join(format!("device-filter-test-{}", std::process::id()));
        std::fs::create_dir(&cgroup).unwrap();
        let fd = std::fs::File::open(&cgroup).unwrap();
        let rule =
            Rule { allow: true, kind: Kind::Any, major: None, minor: None, access: access::ALL };
        let program = load(&[rule, Rule { major: Some(7), ..rule }]);
        let result = program.and_then(|program| attach(fd.as_fd(), program.as_fd()));
        std::fs::remove_dir(&cgroup).unwrap();
        result.unwrap();
    }
}
