//! Which system calls a container may make: this server's own default profile, and profile files.
//!
//! The default profile answers a call in one of three ways. What programs need is allowed; what
//! changes the machine (mounts, modules, clocks, ...) is allowed together with the capability that
//! the kernel asks for anyway and is EPERM without it; everything else, also calls that are not
//! invented yet, is ENOSYS, so that a C library falls back to an older call as on an older kernel.
//! The names are in [`names`]; the agent skips those that its libseccomp does not know.

mod names;

use crate::{sandbox::SandboxError, security::Seccomp};
use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};
use std::{collections::HashSet, path::Path};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The CLONE_NEW* bits of clone's flags: new namespaces are CAP_SYS_ADMIN's.
const NEW_NAMESPACES: u64 = 0x7E02_0000;
/// The address families between which AF_ALG (38) and AF_VSOCK (40) are left out: the kernel's crypto
/// parsers and the way to the host.
const AF_ALG: u64 = 38;
const AF_NFC: u64 = 39;
const AF_VSOCK: u64 = 40;
/// personality(2): Linux, 32 bit Linux, each with UNAME26, and "only ask".
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The filter for a container with these capabilities; `None`: every call is allowed.
pub fn profile(
    seccomp: &Seccomp,
    capabilities: &HashSet<Capability>,
) -> Result<Option<LinuxSeccomp>, SandboxError> {
    match seccomp {
        Seccomp::Unconfined => Ok(None),
        Seccomp::RuntimeDefault => Ok(Some(runtime_default(capabilities))),
        Seccomp::Localhost(file) => localhost(Path::new(file)).map(Some),
    }
}

fn localhost(file: &Path) -> Result<LinuxSeccomp, SandboxError> {
    let refuse = |why: String| {
        let field = "linux.security_context.seccomp.localhost_ref";
        SandboxError::invalid(field, format!("{}: {why}", file.display()))
    };
    let bytes = std::fs::read(file).map_err(|error| refuse(error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))
}

fn runtime_default(capabilities: &HashSet<Capability>) -> LinuxSeccomp {
    let mut rules = vec![allow(names::ALLOWED.iter().flat_map(|group| group.iter().copied()))];
    let mut allowed = HashSet::new();
    for (capability, calls) in names::WITH_CAPABILITY {
        if capabilities.contains(capability) {
            allowed.extend(calls.iter().copied());
        }
    }
    let mut refused: Vec<&str> = names::WITH_CAPABILITY
        .iter()
        .flat_map(|(_, calls)| calls.iter().copied())
        .filter(|call| !allowed.contains(call))
        .collect();
    refused.extend(names::REFUSED);
    refused.sort_unstable();
    refused.dedup();
    if !allowed.is_empty() {
        rules.push(allow(allowed));
    }
    rules.push(refuse(refused));
    rules.extend(clone_rules(capabilities.contains(&Capability::SysAdmin)));
    for family in [
        (AF_ALG, LinuxSeccompOperator::ScmpCmpLt),
        (AF_NFC, LinuxSeccompOperator::ScmpCmpEq),
        (AF_VSOCK, LinuxSeccompOperator::ScmpCmpGt),
    ] {
        rules.push(allow_if("socket", argument(0, family.0, None, family.1)));
    }
    for personality in PERSONALITIES {
        let equal = argument(0, personality, None, LinuxSeccompOperator::ScmpCmpEq);
        rules.push(allow_if("personality", equal));
    }
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(ENOSYS))
        .set_architectures(Some(architectures()))
        .set_syscalls(Some(rules));
    profile
}

/// clone3's flags lie in memory, where a filter cannot look: without CAP_SYS_ADMIN it does not exist,
/// and the C library calls clone, whose flags are checked.
fn clone_rules(admin: bool) -> Vec<LinuxSyscall> {
    if admin {
        return vec![allow(["clone", "clone3"])];
    }
    let none = argument(0, NEW_NAMESPACES, Some(0), LinuxSeccompOperator::ScmpCmpMaskedEq);
    vec![allow_if("clone", none)]
}

fn architectures() -> Vec<Arch> {
    if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    }
}

fn allow<'a>(calls: impl IntoIterator<Item = &'a str>) -> LinuxSyscall {
    let mut calls: Vec<String> = calls.into_iter().map(str::to_owned).collect();
    calls.sort_unstable();
    let mut rule = LinuxSyscall::default();
    rule.set_names(calls).set_action(LinuxSeccompAction::ScmpActAllow);
    rule
}

fn allow_if(call: &str, argument: LinuxSeccompArg) -> LinuxSyscall {
    let mut rule = allow([call]);
    rule.set_args(Some(vec![argument]));
    rule
}

fn refuse(calls: Vec<&str>) -> LinuxSyscall {
    let mut rule = allow(calls);
    rule.set_action(LinuxSeccompAction::ScmpActErrno).set_errno_ret(Some(EPERM));
    rule
}

fn argument(
    index: usize,
    value: u64,
    value_two: Option<u64>,
    op: LinuxSeccompOperator,
) -> LinuxSeccompArg {
    let builder = LinuxSeccompArgBuilder::default().index(index).value(value).op(op);
    let builder = match value_two {
        Some(second) => builder.value_two(second),
        None => builder,
    };
    builder.build().expect("every field has a default")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(call: &str, capabilities: &[Capability]) -> &'static str {
        let capabilities = capabilities.iter().copied().collect();
        let profile = profile(&Seccomp::RuntimeDefault, &capabilities).unwrap().unwrap();
        let rules: Vec<_> = profile
            .syscalls()
            .iter()
            .flatten()
            .filter(|rule| rule.names().iter().any(|name| name == call))
            .collect();
        match rules.as_slice() {
            [] => "ENOSYS",
            [rule] if rule.action() == LinuxSeccompAction::ScmpActErrno => "EPERM",
            [rule] if rule.args().is_none() => "allow",
            rules => {
                assert!(rules.iter().all(|rule| rule.args().is_some()), "{call} has two answers");
                "by argument"
            }
        }
    }

    #[test]
    fn each_call_has_one_answer_and_the_right_one() {
        let table = [
            ("read", &[][..], "allow"),
            ("execve", &[], "allow"),
            ("openat2", &[], "allow"),
            ("futex", &[], "allow"),
            ("mount", &[], "EPERM"),
            ("mount", &[Capability::SysAdmin], "allow"),
            ("bpf", &[Capability::Bpf], "allow"),
            ("init_module", &[Capability::SysAdmin], "EPERM"),
            ("clone", &[], "by argument"),
            ("clone", &[Capability::SysAdmin], "allow"),
            ("clone3", &[], "ENOSYS"),
            ("socket", &[], "by argument"),
            ("personality", &[], "by argument"),
            ("keyctl", &[Capability::SysAdmin], "EPERM"),
            ("io_uring_setup", &[], "ENOSYS"),
            ("a_call_of_next_year", &[], "ENOSYS"),
            ("chroot", &[Capability::SysChroot], "allow"),
        ];
        for (call, capabilities, expected) in table {
            assert_eq!(answer(call, capabilities), expected, "{call} with {capabilities:?}");
        }
    }

    #[test]
    fn no_name_is_both_allowed_for_all_and_refused() {
        let allowed: HashSet<_> = names::ALLOWED.iter().flat_map(|group| group.iter()).collect();
        let count: usize = names::ALLOWED.iter().map(|group| group.len()).sum();
        assert_eq!(allowed.len(), count, "a name is listed twice");
        for call in names::WITH_CAPABILITY.iter().flat_map(|(_, calls)| calls.iter()) {
            assert!(!allowed.contains(call), "{call}");
        }
        for call in names::REFUSED {
            assert!(!allowed.contains(call), "{call}");
        }
    }

    #[test]
    fn a_profile_file_is_read_and_its_absence_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("profile.json");
        let seccomp = Seccomp::Localhost(file.display().to_string());
        let error = profile(&seccomp, &HashSet::new()).unwrap_err().to_string();
        assert!(error.contains("localhost_ref") && error.contains("profile.json"), "{error}");
        let json = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chmod"],"action":"SCMP_ACT_ERRNO"}]}"#;
        std::fs::write(&file, json).unwrap();
        let read = profile(&seccomp, &HashSet::new()).unwrap().unwrap();
        assert_eq!(read.default_action(), LinuxSeccompAction::ScmpActAllow);
    }
}
