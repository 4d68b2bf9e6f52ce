//! Upper bounds that both sides keep. Whatever exceeds one ends the guest with an error.

/// Virtual processors of one sandbox.
pub const MAX_VCPUS: usize = 16;
/// Files granted to one sandbox (an image chain of 200 layers, with data files, and room to spare).
pub const MAX_DEVICES: usize = 1024;
/// Descriptors of a request queue.
pub const QUEUE_SIZE: usize = 128;
/// Payload bytes of one ring request.
pub const MAX_REQUEST_BYTES: u64 = 16 << 20;
/// Bytes of one [`Copy`](crate::ring::RequestKind::Copy) or [`Compare`](crate::ring::RequestKind::Compare) request.
pub const MAX_COPY_BYTES: u64 = 256 << 20;
/// Bytes of one message from guest to monitor.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Bytes of all messages of one run.
pub const MAX_MESSAGE_BYTES_TOTAL: u64 = 256 << 20;
/// Bytes of the request that starts a run, and of an answer to a call.
pub const MAX_REQUEST_MESSAGE_BYTES: usize = 256 << 10;
/// A file name inside an image (qcow2 allows 1023, VMDK descriptors are lines).
pub const MAX_NAME_BYTES: usize = 4095;
/// Layers of a chain.
pub const MAX_CHAIN_DEPTH: usize = 200;
/// Bytes of the log ring (panic message included).
pub const LOG_BYTES: usize = 4096;
