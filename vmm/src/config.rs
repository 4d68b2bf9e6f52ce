//! What the caller decides about a run.

use std::time::Duration;

/// The user `nobody` of all usual systems.
const NOBODY: u32 = 65534;

/// Limits of one sandbox.
#[derive(Clone, Debug)]
pub struct Settings {
    /// vCPUs that the guest may use, 1 to 16 (other values are moved into that range). Each costs memory and a thread
    /// only once the guest starts it.
    pub vcpus: u32,
    /// Ceiling of guest memory in bytes: program, stacks and heap. Memory is taken only as the guest touches it.
    pub memory: u64,
    /// A guest that completes no request and sends no message for this long is ended.
    pub stall: Duration,
    /// The run may take no longer than this.
    pub time_limit: Option<Duration>,
    /// The monitor process, guest included, may use no more than so many seconds of processor time.
    pub cpu_limit: Option<u64>,
    /// No file is written: where the system would still let the monitor process write one, it ends.
    pub read_only: bool,
    /// Let the guest use AVX2 and what belongs to it (x86-64-v3) where the host has it. Makes the start a little slower.
    pub vectors: bool,
    /// The user and group that the monitor process becomes where the caller is root.
    pub user: u32,
    /// Keep the registers of a crashed guest, and the standard error stream of the monitor process.
    pub debug: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory: 256 << 20,
            stall: Duration::from_secs(10),
            time_limit: None,
            cpu_limit: None,
            read_only: false,
            vectors: false,
            user: NOBODY,
            debug: false,
        }
    }
}
