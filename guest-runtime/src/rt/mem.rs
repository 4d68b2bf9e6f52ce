//! The functions that compiled code calls to move, fill and compare bytes. No library provides them here.
//!
//! In assembler, since a compiler that sees a loop copying bytes makes it a call of `memcpy`. Up to 128 bytes everything is
//! loaded before anything is stored; then come turns of 64 bytes, and from [`REP`] bytes on the processor's own string
//! instructions, which are the fastest for long runs. SSE2 is part of every x86-64.

use core::arch::naked_asm;

/// Bytes from which the string instructions win over a loop.
const REP: usize = 1024;

/// Copies `n` bytes.
///
/// # Safety
/// As in C: both ranges are valid and do not overlap.
#[unsafe(naked)]
#[cfg_attr(feature = "freestanding", unsafe(no_mangle))]
pub unsafe extern "C" fn memcpy(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, {rep}",
        "jb {short}",
        "mov rcx, rdx",
        "rep movsb",
        "ret",
        rep = const REP,
        short = sym forward,
    )
}

/// Copies `n` bytes between ranges that may overlap.
///
/// # Safety
/// As in C: both ranges are valid.
#[unsafe(naked)]
#[cfg_attr(feature = "freestanding", unsafe(no_mangle))]
pub unsafe extern "C" fn memmove(dst: *mut u8, src: *const u8, n: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdi",
        "sub rcx, rsi",
        // As unsigned numbers: dst does not lie inside the source, so going forward is right.
        "cmp rcx, rdx",
        "jae {forward}",
        "cmp rdx, 128",
        "jbe {forward}",
        // Backward in turns of 64; the first 64 bytes are loaded now and stored last.
        "movups xmm4, [rsi]",
        "movups xmm5, [rsi + 16]",
        "movups xmm6, [rsi + 32]",
        "movups xmm7, [rsi + 48]",
        "2:",
        "movups xmm0, [rsi + rdx - 16]",
        "movups xmm1, [rsi + rdx - 32]",
        "movups xmm2, [rsi + rdx - 48]",
        "movups xmm3, [rsi + rdx - 64]",
        "movups [rdi + rdx - 16], xmm0",
        "movups [rdi + rdx - 32], xmm1",
        "movups [rdi + rdx - 48], xmm2",
        "movups [rdi + rdx - 64], xmm3",
        "sub rdx, 64",
        "cmp rdx, 64",
        "ja 2b",
        "movups [rdi], xmm4",
        "movups [rdi + 16], xmm5",
        "movups [rdi + 32], xmm6",
        "movups [rdi + 48], xmm7",
        "ret",
        forward = sym forward,
    )
}

/// Copies forward, without string instructions, and returns rax as it found it. Ranges may overlap if `dst` is below `src`,
/// and any how up to 128 bytes.
#[unsafe(naked)]
unsafe extern "C" fn forward(dst: *mut u8, src: *const u8, n: usize) {
    naked_asm!(
        "cmp rdx, 16",
        "jb 5f",
        "cmp rdx, 32",
        "ja 2f",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi + rdx - 16]",
        "movups [rdi], xmm0",
        "movups [rdi + rdx - 16], xmm1",
        "ret",
        // 33 to 64
        "2:",
        "cmp rdx, 64",
        "ja 3f",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi + 16]",
        "movups xmm2, [rsi + rdx - 32]",
        "movups xmm3, [rsi + rdx - 16]",
        "movups [rdi], xmm0",
        "movups [rdi + 16], xmm1",
        "movups [rdi + rdx - 32], xmm2",
        "movups [rdi + rdx - 16], xmm3",
        "ret",
        // 65 and more: the last 64 bytes are loaded now and stored last.
        "3:",
        "lea rcx, [rdi + rdx - 64]",
        "movups xmm4, [rsi + rdx - 64]",
        "movups xmm5, [rsi + rdx - 48]",
        "movups xmm6, [rsi + rdx - 32]",
        "movups xmm7, [rsi + rdx - 16]",
        "4:",
        "movups xmm0, [rsi]",
        "movups xmm1, [rsi + 16]",
        "movups xmm2, [rsi + 32]",
        "movups xmm3, [rsi + 48]",
        "movups [rdi], xmm0",
        "movups [rdi + 16], xmm1",
        "movups [rdi + 32], xmm2",
        "movups [rdi + 48], xmm3",
        "add rsi, 64",
        "add rdi, 64",
        "cmp rdi, rcx",
        "jb 4b",
        "movups [rcx], xmm4",
        "movups [rcx + 16], xmm5",
        "movups [rcx + 32], xmm6",
        "movups [rcx + 48], xmm7",
        "ret",
        // 0 to 15
        "5:",
        "cmp edx, 8",
        "jb 6f",
        "mov r8, [rsi]",
        "mov r9, [rsi + rdx - 8]",
        "mov [rdi], r8",
        "mov [rdi + rdx - 8], r9",
        "ret",
        "6:",
        "cmp edx, 4",
        "jb 7f",
        "mov r8d, [rsi]",
        "mov r9d, [rsi + rdx - 4]",
        "mov [rdi], r8d",
        "mov [rdi + rdx - 4], r9d",
        "ret",
        "7:",
        "test edx, edx",
        "jz 8f",
        // 1 to 3: first, middle and last byte, which may be the same.
        "movzx r8d, byte ptr [rsi]",
        "movzx r9d, byte ptr [rsi + rdx - 1]",
        "mov rcx, rdx",
        "shr rcx, 1",
        "movzx r10d, byte ptr [rsi + rcx]",
        "mov [rdi], r8b",
        "mov [rdi + rcx], r10b",
        "mov [rdi + rdx - 1], r9b",
        "8:",
        "ret",
    )
}

/// Fills `n` bytes.
///
/// # Safety
/// As in C: the range is valid.
#[unsafe(naked)]
#[cfg_attr(feature = "freestanding", unsafe(no_mangle))]
pub unsafe extern "C" fn memset(dst: *mut u8, byte: i32, n: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "cmp rdx, {rep}",
        "jae 5f",
        "mov rax, 0x0101010101010101",
        "movzx ecx, sil",
        "imul rcx, rax",
        "mov rax, r8",
        "cmp rdx, 16",
        "jb 3f",
        "movq xmm0, rcx",
        "punpcklqdq xmm0, xmm0",
        "movups [rdi + rdx - 16], xmm0",
        "lea rdx, [rdi + rdx - 16]",
        "2:",
        "movups [rdi], xmm0",
        "add rdi, 16",
        "cmp rdi, rdx",
        "jb 2b",
        "ret",
        // 0 to 15
        "3:",
        "cmp edx, 4",
        "jb 4f",
        "mov [rdi], ecx",
        "mov [rdi + rdx - 4], ecx",
        "cmp edx, 8",
        "jbe 6f",
        "mov [rdi + 4], ecx",
        "mov [rdi + rdx - 8], ecx",
        "ret",
        "4:",
        "test edx, edx",
        "jz 6f",
        "mov [rdi], cl",
        "mov [rdi + rdx - 1], cl",
        "shr edx, 1",
        "mov [rdi + rdx], cl",
        "6:",
        "ret",
        "5:",
        "mov eax, esi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret",
        rep = const REP,
    )
}

/// Compares `n` bytes: negative, zero or positive as the first difference says.
///
/// # Safety
/// As in C: both ranges are valid.
#[unsafe(naked)]
#[cfg_attr(feature = "freestanding", unsafe(no_mangle))]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!(
        "xor r8d, r8d",
        "sub rdx, 16",
        "jb 4f",
        // Blocks of 16 at r8; the last one is moved back so that it ends at the end.
        "2:",
        "movups xmm0, [rdi + r8]",
        "movups xmm1, [rsi + r8]",
        "pcmpeqb xmm0, xmm1",
        "pmovmskb eax, xmm0",
        "xor eax, 0xffff",
        "jnz 3f",
        "cmp r8, rdx",
        "je 6f",
        "add r8, 16",
        "cmp r8, rdx",
        "cmova r8, rdx",
        "jmp 2b",
        "3:",
        "bsf eax, eax",
        "add r8, rax",
        "jmp 5f",
        // Fewer than 16: byte by byte.
        "4:",
        "add rdx, 16",
        "jz 6f",
        "7:",
        "movzx eax, byte ptr [rdi + r8]",
        "cmp al, [rsi + r8]",
        "jne 5f",
        "inc r8",
        "cmp r8, rdx",
        "jb 7b",
        "6:",
        "xor eax, eax",
        "ret",
        "5:",
        "movzx eax, byte ptr [rdi + r8]",
        "movzx ecx, byte ptr [rsi + r8]",
        "sub eax, ecx",
        "ret",
    )
}

/// Whether `n` bytes differ: 0 if not.
///
/// # Safety
/// As [`memcmp`].
#[unsafe(naked)]
#[cfg_attr(feature = "freestanding", unsafe(no_mangle))]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    naked_asm!("jmp {memcmp}", memcmp = sym memcmp)
}

/// Bytes before the first zero byte. For error texts only, so it is short and not fast.
///
/// # Safety
/// As in C: a zero byte ends the string.
#[unsafe(naked)]
#[cfg_attr(feature = "freestanding", unsafe(no_mangle))]
pub unsafe extern "C" fn strlen(string: *const u8) -> usize {
    naked_asm!("xor eax, eax", "2:", "cmp byte ptr [rdi + rax], 0", "je 3f", "inc rax", "jmp 2b", "3:", "ret")
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    /// Every length around a change of method, and some far behind.
    fn lengths() -> impl Iterator<Item = usize> {
        (0..300).chain(REP - 70..REP + 70).chain([4095, 4096, 65_537])
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    #[test]
    fn copy_moves_exactly_the_range() {
        for len in lengths() {
            for shift in [0, 1, 15] {
                let src = pattern(len + 32);
                let mut dst = std::vec![0xee; len + 32];
                // SAFETY: both ranges lie inside their vectors.
                let back = unsafe { memcpy(dst.as_mut_ptr().add(8), src.as_ptr().add(shift), len) };
                assert_eq!(back, dst[8..].as_mut_ptr());
                assert_eq!(dst[8..8 + len], src[shift..shift + len], "{len} {shift}");
                assert!(dst[..8].iter().chain(&dst[8 + len..]).all(|&byte| byte == 0xee), "{len} {shift}");
            }
        }
    }

    #[test]
    fn overlapping_ranges_move_like_the_library() {
        for len in lengths() {
            for distance in [0_usize, 1, 7, 16, 63, 64, 65, 200] {
                for (from, to) in [(0, distance), (distance, 0)] {
                    let mut bytes = pattern(len + distance + 8);
                    let mut wanted = bytes.clone();
                    wanted.copy_within(from..from + len, to);
                    let start = bytes.as_mut_ptr();
                    // SAFETY: both ranges lie inside the vector.
                    unsafe { memmove(start.add(to), start.add(from), len) };
                    assert!(bytes == wanted, "{len} from {from} to {to}");
                }
            }
        }
    }

    #[test]
    fn fill_fills_exactly_the_range() {
        for len in lengths() {
            let mut bytes = std::vec![0xee; len + 16];
            // SAFETY: the range lies inside the vector.
            let back = unsafe { memset(bytes.as_mut_ptr().add(8), 0x1_5a, len) };
            assert_eq!(back, bytes[8..].as_mut_ptr());
            assert!(bytes[8..8 + len].iter().all(|&byte| byte == 0x5a), "{len}");
            assert!(bytes[..8].iter().chain(&bytes[8 + len..]).all(|&byte| byte == 0xee), "{len}");
        }
    }

    #[test]
    fn strings_end_at_zero() {
        for (string, len) in [(c"", 0), (c"a", 1), (c"instar", 6)] {
            // SAFETY: a C string.
            assert_eq!(unsafe { strlen(string.as_ptr().cast()) }, len);
        }
    }

    #[test]
    fn compare_finds_the_first_difference() {
        for len in lengths() {
            let a = pattern(len);
            // SAFETY: both ranges are the vector.
            assert_eq!(unsafe { memcmp(a.as_ptr(), a.clone().as_ptr(), len) }, 0, "{len}");
            for at in [0, 1, 14, 15, 16, 17, len / 2, len.saturating_sub(1)].into_iter().filter(|&at| at < len) {
                let mut b = a.clone();
                b[at] ^= 0x80;
                if let Some(later) = b.get_mut(at + 1) {
                    *later ^= 0x80;
                }
                // SAFETY: both ranges are whole vectors of this length.
                let (sign, differs) =
                    unsafe { (memcmp(a.as_ptr(), b.as_ptr(), len), bcmp(a.as_ptr(), b.as_ptr(), len)) };
                assert_eq!(sign.signum(), if a[at] > b[at] { 1 } else { -1 }, "{len} at {at}");
                assert_ne!(differs, 0);
            }
        }
    }
}
