//! Compiles a seccomp profile to the kernel's instructions, once per profile: a pod's containers
//! and every exec in them share the result, which a child installs with one system call.

use crate::error::{Error, Step};
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};
use rustix::fd::OwnedFd;
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

/// A compiled profile.
#[derive(Debug, Clone)]
pub struct Filter {
    /// Memfd with the instructions.
    pub program: Arc<OwnedFd>,
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: u64,
}

/// Compiled profiles by their text.
#[derive(Debug, Default)]
pub struct Filters(Mutex<HashMap<String, Filter>>);

/// More different profiles than a pod has containers are nobody's need.
const KEPT: usize = 16;

impl Filters {
    /// The filter for a profile, compiled now unless it was before.
    pub fn get(&self, profile: &LinuxSeccomp) -> Result<Filter, Error> {
        let text =
            serde_json::to_string(profile).map_err(|error| Error::invalid(error.to_string()))?;
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&text).cloned();
        if let Some(filter) = known {
            return Ok(filter);
        }
        let filter = compile(profile)?;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= KEPT {
            all.clear();
        }
        all.insert(text, filter.clone());
        Ok(filter)
    }
}

fn compile(profile: &LinuxSeccomp) -> Result<Filter, Error> {
    let failed =
        |error: libseccomp::error::SeccompError| Error::invalid(format!("linux.seccomp: {error}"));
    if profile.listener_path().is_some() {
        return Err(Error::Unsupported("linux.seccomp.listenerPath".to_owned()));
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(failed)?;
    filter.set_ctl_optimize(2).map_err(failed)?;
    for arch in profile.architectures().iter().flatten() {
        let Some(arch) = architecture(*arch) else {
            continue;
        };
        if !filter.is_arch_present(arch).map_err(failed)? {
            filter.add_arch(arch).map_err(failed)?;
        }
    }
    for rule in profile.syscalls().iter().flatten() {
        let what = action(rule.action(), rule.errno_ret())?;
        if what == default {
            // The library refuses a rule that changes nothing.
            continue;
        }
        let conditions = rule.args().as_deref().unwrap_or_default();
        for name in rule.names() {
            // Profiles list the calls of every kernel; one this library does not know has no number.
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            for conditions in alternatives(conditions) {
                filter.add_rule_conditional(what, call, &conditions).map_err(failed)?;
            }
        }
    }
    let program = a3s_box_sys::memfd::create("seccomp").step("seccomp filter")?;
    filter.export_bpf(&program).map_err(failed)?;
    Ok(Filter { program: Arc::new(program.into()), flags: flags(profile)? })
}

/// Conditions on different arguments must all hold. The library takes one per argument, so several
/// on one argument become rules of their own, of which any may hold, as runc and crun have it.
fn alternatives(conditions: &[LinuxSeccompArg]) -> Vec<Vec<ScmpArgCompare>> {
    let mut seen = HashSet::new();
    let all: Vec<_> = conditions.iter().map(compare).collect();
    if conditions.iter().all(|condition| seen.insert(condition.index())) {
        vec![all]
    } else {
        all.into_iter().map(|one| vec![one]).collect()
    }
}

fn compare(condition: &LinuxSeccompArg) -> ScmpArgCompare {
    let (operator, value) = match condition.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, condition.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, condition.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, condition.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, condition.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, condition.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, condition.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(condition.value()), condition.value_two().unwrap_or(0))
        }
    };
    ScmpArgCompare::new(condition.index() as u32, operator, value)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, Error> {
    let errno = errno.unwrap_or(rustix::io::Errno::PERM.raw_os_error() as u32);
    let number = u16::try_from(errno)
        .map_err(|_| Error::invalid(format!("linux.seccomp: errno {errno} is out of range")))?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(i32::from(number)),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(number),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Error::Unsupported("the seccomp action SCMP_ACT_NOTIFY".to_owned()));
        }
    })
}

/// None for those whose programs this processor cannot run.
fn architecture(arch: Arch) -> Option<ScmpArch> {
    match arch {
        Arch::ScmpArchNative => Some(ScmpArch::Native),
        Arch::ScmpArchX86 => Some(ScmpArch::X86),
        Arch::ScmpArchX86_64 => Some(ScmpArch::X8664),
        Arch::ScmpArchX32 => Some(ScmpArch::X32),
        Arch::ScmpArchArm => Some(ScmpArch::Arm),
        Arch::ScmpArchAarch64 => Some(ScmpArch::Aarch64),
        _ => None,
    }
}

fn flags(profile: &LinuxSeccomp) -> Result<u64, Error> {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => 2,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 4,
            // The process has one thread when the filter is installed.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                return Err(Error::Unsupported(format!("the seccomp flag {flag}")));
            }
        };
    }
    Ok(flags)
}
