//! How large a pod's virtual machine is.
//!
//! Annotations say it exactly. Otherwise it follows from CRI `resources` plus `overhead`, with room
//! for the guest's own kernel, rounded up to a class, because each size has a template of its own
//! (docs/decisions/0002). What the CRI leaves open is the configured default.

use crate::sandbox::SandboxError;
use a3s_box_api::cri::LinuxContainerResources;
use a3s_box_types::shim::VmSize;
use std::collections::BTreeMap;

/// Annotation: number of virtual CPUs.
pub const VCPUS: &str = "a3s.box/vcpus";
/// Annotation: guest memory in MiB.
pub const MEMORY_MB: &str = "a3s.box/memory-mb";

const MIB: u64 = 1 << 20;
const DEFAULT_PERIOD: u64 = 100_000;

/// What the configuration says about sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SizeRules {
    /// For a pod without limits.
    pub default: VmSize,
    /// The smallest guest that boots.
    pub min_memory_mb: u32,
    /// The largest one allowed.
    pub max: VmSize,
    /// Memory of the guest that no container can use: kernel, agent.
    pub guest_overhead_mb: u32,
}

/// The size of one pod's virtual machine.
///
/// A limit above the configured maximum is legal in Kubernetes, where limits may exceed the node, so
/// it gets the maximum; an annotation out of bounds is a mistake and is refused.
pub fn vm_size(
    resources: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
    annotations: &BTreeMap<String, String>,
    rules: &SizeRules,
) -> Result<VmSize, SandboxError> {
    let vcpus = match annotations.get(VCPUS) {
        Some(text) => annotated(VCPUS, text, 1, rules.max.vcpus)?,
        None => vcpus(resources, overhead, rules)?,
    };
    let memory_mb = match annotations.get(MEMORY_MB) {
        Some(text) => annotated(MEMORY_MB, text, rules.min_memory_mb, rules.max.memory_mb)?,
        None => memory_mb(resources, overhead, rules)?,
    };
    Ok(VmSize { vcpus, memory_mb })
}

/// As many processors as a machine of this size may grow to while it runs. Each that a kernel may get
/// costs it memory, a quarter of a megabyte or more: room is for what a pod may want, not for all there is.
pub fn most_vcpus(size: VmSize, max: u32) -> u32 {
    size.vcpus.saturating_mul(4).min(max).max(size.vcpus)
}

fn annotated(key: &str, text: &str, min: u32, max: u32) -> Result<u32, SandboxError> {
    text.parse().ok().filter(|value| (min..=max).contains(value)).ok_or_else(|| {
        SandboxError::invalid(
            format!("annotations[{key}]"),
            format!("{text:?} is not a number from {min} to {max}"),
        )
    })
}

fn vcpus(
    resources: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
    rules: &SizeRules,
) -> Result<u32, SandboxError> {
    let Some(limit) = millicpus("linux.resources", resources)? else {
        return Ok(rules.default.vcpus);
    };
    let total = limit.saturating_add(millicpus("linux.overhead", overhead)?.unwrap_or(0));
    Ok(class(total.div_ceil(1000), 1).clamp(1, u64::from(rules.max.vcpus)) as u32)
}

/// Thousandths of a CPU; `None`: no limit.
fn millicpus(
    field: &str,
    resources: Option<&LinuxContainerResources>,
) -> Result<Option<u64>, SandboxError> {
    let Some(resources) = resources else { return Ok(None) };
    let Ok(period) = u64::try_from(resources.cpu_period) else {
        return Err(SandboxError::invalid(format!("{field}.cpu_period"), "is negative"));
    };
    let period = if period == 0 { DEFAULT_PERIOD } else { period };
    match u64::try_from(resources.cpu_quota) {
        Ok(0) | Err(_) => Ok(None),
        Ok(quota) => Ok(Some(quota.saturating_mul(1000).div_ceil(period))),
    }
}

fn memory_mb(
    resources: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
    rules: &SizeRules,
) -> Result<u32, SandboxError> {
    let limit = memory_bytes("linux.resources", resources)?;
    if limit == 0 {
        return Ok(rules.default.memory_mb);
    }
    let bytes = limit.saturating_add(memory_bytes("linux.overhead", overhead)?);
    let total = bytes.div_ceil(MIB).saturating_add(u64::from(rules.guest_overhead_mb));
    let (min, max) = (u64::from(rules.min_memory_mb), u64::from(rules.max.memory_mb));
    Ok(class(total, min).clamp(min, max) as u32)
}

fn memory_bytes(
    field: &str,
    resources: Option<&LinuxContainerResources>,
) -> Result<u64, SandboxError> {
    let limit = resources.map_or(0, |resources| resources.memory_limit_in_bytes);
    u64::try_from(limit)
        .map_err(|_| SandboxError::invalid(format!("{field}.memory_limit_in_bytes"), "is negative"))
}

/// The smallest of 1, 1.5, 2, 3, 4, 6, 8, ... times a power of two that holds `need`, from `min` on.
fn class(need: u64, min: u64) -> u64 {
    let need = need.max(min).min(1 << 40);
    let power = need.next_power_of_two();
    let between = power / 4 * 3;
    if between >= need && power >= 4 { between } else { power }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::needless_pass_by_value, reason = "literals read better by value")]

    use super::*;

    const RULES: SizeRules = SizeRules {
        default: VmSize { vcpus: 1, memory_mb: 512 },
        min_memory_mb: 128,
        max: VmSize { vcpus: 8, memory_mb: 16384 },
        guest_overhead_mb: 64,
    };

    fn limits(memory_mb: i64, quota: i64) -> LinuxContainerResources {
        LinuxContainerResources {
            memory_limit_in_bytes: memory_mb << 20,
            cpu_quota: quota,
            cpu_period: 100_000,
            ..Default::default()
        }
    }

    fn sized(
        resources: Option<&LinuxContainerResources>,
        overhead: Option<&LinuxContainerResources>,
        annotations: &[(&str, &str)],
    ) -> Result<(u32, u32), String> {
        let annotations =
            annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        vm_size(resources, overhead, &annotations, &RULES)
            .map(|size| (size.vcpus, size.memory_mb))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_pod_without_limits_gets_the_default() {
        assert_eq!(sized(None, None, &[]), Ok((1, 512)));
        assert_eq!(sized(Some(&limits(0, -1)), Some(&limits(64, 10_000)), &[]), Ok((1, 512)));
    }

    #[test]
    fn limits_and_overhead_are_added_and_rounded_up_to_a_class() {
        let table = [
            (limits(15, 0), None, (1, 128)),
            (limits(64, 50_000), None, (1, 128)),
            (limits(65, 100_000), None, (1, 192)),
            (limits(128, 100_001), None, (2, 192)),
            (limits(256, 250_000), Some(limits(64, 100_000)), (4, 384)),
            (limits(1000, 450_000), None, (6, 1536)),
            (limits(1_000_000, 6_400_000), None, (8, 16384)),
        ];
        for (resources, overhead, expected) in table {
            assert_eq!(
                sized(Some(&resources), overhead.as_ref(), &[]),
                Ok(expected),
                "{resources:?}"
            );
        }
    }

    #[test]
    fn annotations_are_exact_and_bounded() {
        assert_eq!(
            sized(Some(&limits(64, 0)), None, &[(VCPUS, "3"), (MEMORY_MB, "777")]),
            Ok((3, 777))
        );
        for (key, value) in [
            (VCPUS, "0"),
            (VCPUS, "9"),
            (VCPUS, "-1"),
            (MEMORY_MB, "127"),
            (MEMORY_MB, "1e9"),
            (MEMORY_MB, ""),
        ] {
            let error = sized(None, None, &[(key, value)]).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn negative_amounts_are_refused_by_name() {
        let error = sized(Some(&limits(-1, 0)), None, &[]).unwrap_err();
        assert!(error.contains("linux.resources.memory_limit_in_bytes"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn every_pod_gets_what_it_asked_for_or_the_maximum(memory: u32, quota in 0i64..10_000_000) {
            let (vcpus, memory_mb) = sized(Some(&limits(i64::from(memory), quota)), None, &[]).unwrap();
            proptest::prop_assert!((1..=8).contains(&vcpus) && (128..=16384).contains(&memory_mb));
            proptest::prop_assert!(memory == 0 || memory_mb == 16384 || memory_mb >= memory + 64);
            proptest::prop_assert!(vcpus == 8 || i64::from(vcpus) * 100_000 >= quota);
        }
    }
}
