//! The guest program of `instar info`.
#![no_std]
#![no_main]

use instar_guest::ops::serve_info;

instar_guest::program!(serve_info);
