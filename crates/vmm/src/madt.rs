//! The table in which a guest's kernel finds its processors (ACPI 6.5, 5.2.12: MADT).
//!
//! QEMU's own marks processors that may be plugged in later as not enabled. Kernels since 6.12.60 take
//! those for none, except under hypervisors that they know by name, of which QEMU's translator is none. So
//! ours stands beside it and has all of them enabled; the kernel is told to begin with fewer (`maxcpus`).
//! All else in it is as QEMU's q35 machine wires it.

/// Of the table's layout: the last one without fields that QEMU 7.2 has nothing for.
pub(crate) const REVISION: u8 = 1;

const LOCAL_APIC: u8 = 0;
const IO_APIC: u8 = 1;
const INTERRUPT_OVERRIDE: u8 = 2;
const LOCAL_NMI: u8 = 4;

const LOCAL_APICS_AT: u32 = 0xfee0_0000;
const IO_APIC_AT: u32 = 0xfec0_0000;
/// The machine has the old interrupt controllers, too.
const PCAT_COMPAT: u32 = 1;
const ENABLED: u32 = 1;
/// Active high, by level.
const LEVEL_HIGH: u16 = 0xd;
const ALL_PROCESSORS: u8 = 0xff;

/// The table's body, behind its header.
pub(crate) fn body(processors: u8) -> Vec<u8> {
    let mut body = [LOCAL_APICS_AT.to_le_bytes(), PCAT_COMPAT.to_le_bytes()].concat();
    for number in 0..processors {
        entry(&mut body, LOCAL_APIC, &[&[number, number], &ENABLED.to_le_bytes()]);
    }
    entry(&mut body, IO_APIC, &[&[0, 0], &IO_APIC_AT.to_le_bytes(), &0_u32.to_le_bytes()]);
    let overrides = [
        (0, 2_u32, 0),
        (5, 5, LEVEL_HIGH),
        (9, 9, LEVEL_HIGH),
        (10, 10, LEVEL_HIGH),
        (11, 11, LEVEL_HIGH),
    ];
    for (isa, global, flags) in overrides {
        let parts: [&[u8]; 3] = [&[0, isa], &global.to_le_bytes(), &flags.to_le_bytes()];
        entry(&mut body, INTERRUPT_OVERRIDE, &parts);
    }
    // Their input 1.
    entry(&mut body, LOCAL_NMI, &[&[ALL_PROCESSORS, 0, 0, 1]]);
    body
}

fn entry(body: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
    let content = parts.concat();
    body.extend([kind, content.len() as u8 + 2]);
    body.extend(content);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_processor_has_an_entry_and_all_entries_have_their_lengths() {
        let table = body(3);
        assert_eq!(table[..8], [0, 0, 0xe0, 0xfe, 1, 0, 0, 0]);
        let mut kinds = Vec::new();
        let mut rest = &table[8..];
        while let [kind, length, ..] = *rest {
            kinds.push((kind, length));
            rest = &rest[usize::from(length)..];
        }
        assert!(rest.is_empty());
        let expected =
            [(0, 8), (0, 8), (0, 8), (1, 12), (2, 10), (2, 10), (2, 10), (2, 10), (2, 10), (4, 6)];
        assert_eq!(kinds, expected);
        assert_eq!(table[16..24], [0, 8, 1, 1, 1, 0, 0, 0], "the second processor");
    }
}
